"""The scripts that turn records into files and README tables."""

import importlib.util
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataeff.bench import Options, Record, cases, read, write

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = Record(
    *("gather", "dataeff", "ours", "time_s", 0.005, "s", "rows=1", "cpu: AMD EPYC"),
    *({"torch": "2.13.0"}, "abc", "2026-01-02T03:04:05+00:00", 2),
)
SPREAD = replace(RECORD, metric="time_spread_s", value=0.002)


def test_merged_records_are_named_after_device_and_day(tmp_path):
    merge_results = script("merge_results")
    gpu = replace(RECORD, device="cuda: NVIDIA H100 80GB HBM3")
    write([gpu], tmp_path / "a.json")
    write([replace(gpu, workload="rgnn")], tmp_path / "b.json")
    merged = merge_results.merge([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "results")
    assert merged.name == "nvidia-h100-80gb-hbm3-2026-01-02.json"
    assert [record.workload for record in read(merged)] == ["gather", "rgnn"]
    assert merge_results.result_name(RECORD.device, RECORD.time) == "cpu-amd-epyc-2026-01-02.json"


def test_records_of_two_devices_are_not_merged(tmp_path):
    write([RECORD, replace(RECORD, device="cuda: H100")], tmp_path / "a.json")
    with pytest.raises(ValueError, match="one device"):
        script("merge_results").merge([tmp_path / "a.json"], tmp_path)


README = """before
<!-- table: gather -->
old
<!-- end -->
between
<!-- table: rgnn -->
<!-- end -->
<!-- summary: gather -->
<!-- end -->
"""


def test_tables_replace_what_is_between_the_markers():
    make_tables = script("make_tables")
    peer = replace(RECORD, provider="torch", role="peer", value=0.01)
    filled = make_tables.fill(README, [RECORD, SPREAD, peer, replace(SPREAD, provider="torch")])
    assert "old" not in filled and "| rows=1 | dataeff | 5 ms ± 1 ms |" in filled
    assert filled.startswith("before\n<!-- table: gather -->\n") and "\nbetween\n" in filled
    assert "No record of `rgnn`." in filled
    summary = filled.partition("summary")[2]
    assert "| torch |" in filled and "| torch |" not in summary and "2.00x torch" in summary


def test_summaries_leave_out_curves_and_what_is_switched_off():
    fill = script("make_tables").fill
    both = [RECORD, SPREAD]
    curve = [replace(r, size="growth of rows: 1", group="growth of rows") for r in both]
    other = [replace(r, provider="dataeff, passes off") for r in both]
    for form, shown in (("summary", False), ("table", True)):
        filled = fill(f"<!-- {form}: gather -->\n<!-- end -->", [*both, *other, *curve])
        assert "| dataeff |" in filled
        assert ("growth of rows" in filled) is ("passes off" in filled) is shown


def test_the_last_run_of_each_size_on_the_most_measured_device_counts():
    later = replace(RECORD, value=0.001, time="2026-02-02T00:00:00+00:00")
    other = replace(RECORD, device="cuda: H100")
    latest = script("make_tables").latest
    assert latest([later, RECORD, other], "gather") == [later, other]
    left = replace(RECORD, size="rows=2")  # of a run before, in which `later` had no part
    assert latest([RECORD, left, later], "gather") == [left, later]
    xeon = replace(later, device="cpu: Xeon", time="2026-03-03T00:00:00+00:00")
    assert latest([later, left, xeon], "gather") == [later, left]
    assert latest([later, xeon], "gather") == [xeon]  # as many sizes, and later


def test_further_devices_have_tables_of_their_own():
    xeon = [replace(record, device="cpu: Xeon") for record in (RECORD, SPREAD)]
    more = [replace(record, size="rows=2") for record in (RECORD, SPREAD)]
    fill, marked = script("make_tables").fill, "<!-- others: gather -->\n<!-- end -->"
    assert "No record" in fill(marked, [RECORD, SPREAD])
    filled = fill(marked, [RECORD, SPREAD, *more, *xeon])
    assert "Xeon" in filled and "EPYC" not in filled and "GPU" not in filled


def test_committed_results_can_be_read():
    for path in (BENCHMARKS / "results").glob("*.json"):
        assert read(path), path


def test_gpu_check_is_valid_bash():
    subprocess.run(["bash", "-n", BENCHMARKS / "gpu_check.sh"], check=True)


def test_gpu_check_asks_for_cases_and_parts_that_there_are(monkeypatch):
    """A wrong name of what it runs on a GPU alone would cost the machine's time."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 37, 1 << 37))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 0)
    text = (BENCHMARKS / "gpu_check.sh").read_text().replace("\\\n", " ")
    benches = re.findall(r"^ +bench ([\w-]+ \d+ .*)$", text, re.MULTILINE)
    assert len(benches) == 5
    for words in map(shlex.split, benches):
        _part, _limit, workload, *options = words
        only = options[options.index("--only") + 1] if "--only" in options else ""
        assert set(options) <= {"--quick", "--only", only}
        asked = Options(quick="--quick" in options, device=torch.device("cuda", 0), only=only)
        assert any(True for _ in cases(workload, asked)), words
    starts = re.search(r"compile_kernels.py (.*?) >", text).group(1)
    echo = ["bash", "-c", f"printf '%s\\n' {starts}"]
    found = subprocess.run(echo, check=True, capture_output=True, text=True).stdout.splitlines()
    sizes = [case.size for case in cases("rgnn", Options(device=torch.device("cuda", 0)))]
    assert len(found) == 6
    assert all(any(size.startswith(start) for size in sizes) for start in found)
    for path in re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", text):
        assert (BENCHMARKS.parent / path).exists(), path


def test_the_documents_show_the_committed_records():
    make_tables = script("make_tables")
    records = make_tables.load(BENCHMARKS / "results")
    for path in make_tables.FILES:
        assert make_tables.fill(path.read_text(), records) == path.read_text()
