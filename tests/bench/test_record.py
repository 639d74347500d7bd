import json
import re

import pytest
import torch

from dataeff.bench.record import Record, Run, commit, read, versions, write


def a_record(**changes):
    run = Run.here(torch.device("cpu"))
    fields = {
        "workload": "gather",
        "provider": "dataeff",
        "role": "ours",
        "metric": "time_s",
        "value": 0.25,
        "unit": "s",
        "size": "rows=10",
    }
    return run.record(**{**fields, **changes})


def test_written_records_are_read_back(tmp_path):
    records = [a_record(), a_record(metric="skipped", value=None, note="no cupy")]
    path = tmp_path / "out.json"
    write(records, path)
    assert read(path) == records
    assert isinstance(json.loads(path.read_text()), list)
    assert len(path.read_text().splitlines()) == len(records) + 2  # one record per line


def test_no_records_are_an_empty_list(tmp_path):
    write([], tmp_path / "out.json")
    assert read(tmp_path / "out.json") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ('{"a": 1}', "list of benchmark records"), ('[{"a": 1}]', "differ")],
)
def test_other_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert "other.json" in str(raised.value)


def test_a_run_describes_device_versions_threads_and_time():
    record = a_record()
    assert record.device.startswith("cpu: ") and len(record.device) > len("cpu: ")
    assert record.versions["torch"] == str(torch.__version__)
    assert record.threads == torch.get_num_threads()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record.time)
    assert {field for field in Record.__dataclass_fields__} == set(
        json.loads(json.dumps(vars(record)))
    )


def test_absent_packages_have_no_version(monkeypatch):
    monkeypatch.setattr("dataeff.bench.record.PACKAGES", ("numpy", "no-such-package"))
    found = versions()
    assert "numpy" in found and "no-such-package" not in found


def test_commit_is_of_this_checkout_only(monkeypatch, tmp_path):
    monkeypatch.delenv("DATAEFF_COMMIT", raising=False)
    assert re.fullmatch(r"([0-9a-f]{12,}(-dirty)?)?", commit())
    monkeypatch.setenv("DATAEFF_COMMIT", "abc")
    assert commit() == "abc"
    monkeypatch.delenv("DATAEFF_COMMIT")
    # Imported from a folder that no repository tracks, there is no commit to name.
    monkeypatch.setattr("dataeff.bench.record.__file__", str(tmp_path / "bench" / "record.py"))
    assert commit() == ""
