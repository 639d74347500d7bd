import json
import os
import stat
import sys

import pytest

from dataeff import bench
from dataeff.bench import storage


@pytest.fixture
def options(tmp_path):
    return bench.Options(quick=True, directory=tmp_path)


def test_every_provider_moves_the_same_bytes(options):
    cases = [storage.case(options, way, 1 << 20, 3) for way in storage.WAYS]
    run = [bench.runner.run_workload("storage", [case], options, print) for case in cases]
    for records in run:
        timed = {record.provider for record in records if record.metric == "time_s"}
        assert "dataeff threads" in timed
        assert any(provider.startswith("os.p") for provider in timed)
    assert not list(options.directory.iterdir())


def test_a_provider_that_moves_other_bytes_is_caught(tmp_path):
    blocks = storage.Blocks(tmp_path, 2 << 20, 1 << 20, 2)
    with pytest.raises(AssertionError, match="the read moved other bytes"):
        blocks.check(lambda: 0, "read")


def test_fio_is_asked_for_the_same_file_and_believed(tmp_path, monkeypatch):
    answer = {
        "jobs": [{"write": {"bw_bytes": 1_500_000_000, "io_bytes": storage.FIO_PASSES * 2 << 20}}]
    }
    fake = tmp_path / "fio"
    fake.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "name = next(a for a in sys.argv if a.startswith('--filename=')).partition('=')[2]\n"
        "os.close(os.open(name, os.O_RDWR))\n"
        f"print({json.dumps(answer)!r})\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    blocks = storage.Blocks(tmp_path, 2 << 20, 1 << 20, 2)
    step = storage._fio("write", "libaio", blocks)
    assert step.call() == 2 << 20
    assert step.metrics() == {"fio_bandwidth_gbs": (1.5, "GB/s")}
    assert step.seconds() == pytest.approx((2 << 20) / 1.5e9)  # one pass, its start not counted
    ours = storage._ours("threads", "write", blocks)
    ours.call()
    blocks.fio_gbs["slower"] = [1e-3]
    share, unit = ours.metrics()["share_of_fio"]
    assert unit == "1" and 1e-3 < share * 1.5 < 1e3  # GB/s, whatever the disk
    ours.close()


def test_fio_that_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(bench.Unavailable, match="fio is not on the PATH"):
        storage._fio("read", "libaio", storage.Blocks(tmp_path, 1 << 20, 1 << 20, 1))
