import os

import pytest

from dataeff.storage import filesystem_of, probe
from dataeff.storage import spill as spill_module


def test_a_probe_measures_and_leaves_nothing(kind, tmp_path):
    found = probe(tmp_path, nbytes=16 << 20, max_seconds=0.05, kind=kind)
    assert found.read_gbs > 0 and found.write_gbs > 0
    assert found.engine == kind
    assert 0 < found.nbytes <= 16 << 20
    assert found.filesystem == filesystem_of(tmp_path) != "unknown"
    assert list(tmp_path.iterdir()) == []


def test_what_makes_the_figures_less_than_they_seem(tmp_path, monkeypatch):
    real = spill_module._open_with
    monkeypatch.setattr(
        spill_module, "_open_unnamed", lambda path, direct, *rest: (real(path, 0, *rest), False)
    )
    found = probe(tmp_path, nbytes=8 << 20, max_seconds=0.05)
    assert not found.direct
    assert any("no direct I/O" in reason for reason in found.reasons)


def test_little_space_is_respected(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    fields = list(free)
    fields[1], fields[4] = 4096, 4096  # block size and blocks free: 16 MiB
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    found = probe(tmp_path, max_seconds=0.05)
    assert found.nbytes == 4 << 20
    assert "only 4194304 bytes were written" in found.reasons[0]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm")
def test_memory_is_called_memory():
    assert filesystem_of("/dev/shm") == "tmpfs"
    found = probe("/dev/shm", nbytes=4 << 20, max_seconds=0.02)
    assert any("tmpfs is memory" in reason for reason in found.reasons)


def test_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "missing")
