import json
import os
import stat
import sys
import warnings

import pytest
import torch

from dataeff import bench
from dataeff.bench import gather_disk
from dataeff.bench.runner import run_workload


@pytest.fixture
def options(tmp_path):
    return bench.Options(quick=True, directory=tmp_path)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gather_disk, "NUM_IDS", 64)
    monkeypatch.setattr(gather_disk, "CHUNK_NUM_ROWS", 1000)
    make = gather_disk.make_inputs
    monkeypatch.setattr(gather_disk, "make_inputs", lambda where, _, dim: make(where, 2500, dim))


def fake_fio(tmp_path, monkeypatch, bw_bytes):
    answer = json.dumps({"jobs": [{"read": {"bw_bytes": bw_bytes}}]})
    fake = tmp_path / "fio"
    fake.write_text(f"#!{sys.executable}\nprint({answer!r})\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return fake


def test_all_providers_return_the_same_rows_and_leave_no_file(
    tmp_path, monkeypatch, options, small
):
    fio = fake_fio(tmp_path, monkeypatch, 4096 * 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        records = run_workload("gather", gather_disk.cases(options), options, print)
    found = {(record.provider, record.metric): record.value for record in records}
    assert ("numpy.memmap", "time_s") in found
    assert found["fio", "fio_reads_per_s"] == 1000
    assert found["fio", "time_s"] == pytest.approx(64 / 1000)  # its start does not count
    assert 1 < found["dataeff threads", "num_reads"] <= 64
    assert found["dataeff threads", "share_of_fio"] > 0
    assert list(tmp_path.iterdir()) == [fio]


def test_draws_differ_but_for_the_first(tmp_path):
    inputs = gather_disk.make_inputs(tmp_path, 3000, 4)
    one, other = inputs.ids(1), inputs.ids(2)
    assert torch.equal(one(), other())
    assert not torch.equal(one(), other())
    inputs.opened()()
    assert list(tmp_path.iterdir()) == []
