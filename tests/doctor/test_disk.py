import errno
from pathlib import Path

import pytest

from dataeff.doctor import disk
from dataeff.storage import Choice, Probe


@pytest.mark.parametrize(
    ("error", "setting", "value", "remedy"),
    [
        (errno.ENOSYS, None, "ENOSYS", "Linux 5.6"),
        (errno.EPERM, "2", "EPERM", "sysctl kernel.io_uring_disabled=0"),
        (errno.EPERM, "0", "EPERM", "seccomp"),
        (errno.ENOMEM, "0", "ENOMEM", "io_uring_setup failed"),
    ],
)
def test_io_uring_says_why_not(monkeypatch, tmp_path, error, setting, value, remedy):
    (tmp_path / "sys/kernel").mkdir(parents=True)
    if setting is not None:
        (tmp_path / "sys/kernel/io_uring_disabled").write_text(setting + "\n")
    monkeypatch.setattr(disk, "io_uring_error", lambda: error)
    found = disk.io_uring(tmp_path)
    assert not found.ok and found.value.startswith(value) and remedy in found.remedy


def test_io_uring_available(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "io_uring_error", lambda: 0)
    assert disk.io_uring(tmp_path).ok


def test_the_probe_itself_answers_with_an_errno():
    assert disk.io_uring_error() in (0, *errno.errorcode)


@pytest.mark.parametrize(("kind", "ok"), [("ext4", True), ("tmpfs", False)])
def test_a_directory_in_memory_frees_none(monkeypatch, tmp_path, kind, ok):
    monkeypatch.setattr("dataeff.storage.filesystem_of", lambda directory: kind)
    found = disk.file_system(tmp_path)
    assert found.ok is ok and f"({kind}, " in found.value and f"{kind} is memory" in found.cost


def test_bandwidth_is_measured_and_leaves_no_file(tmp_path):
    found = {finding.name: finding for finding in disk.bandwidth(tmp_path)}
    if not found["O_DIRECT"].ok:
        pytest.skip(found["O_DIRECT"].value)
    assert found["write bandwidth"].figures["bandwidth_gbs"] > 0
    assert found["read bandwidth"].figures["bandwidth_gbs"] > 0
    assert list(tmp_path.iterdir()) == []


def test_directory_without_o_direct(monkeypatch, tmp_path):
    measured = Probe(1.0, 0.1, False, "overlay", "threads", 64 << 20, ("no direct I/O",))
    monkeypatch.setattr("dataeff.storage.probe", lambda *a, **k: measured)
    direct, write, read = disk.bandwidth(tmp_path)
    assert not direct.ok and "--dir" in direct.remedy
    assert not write.ok and write.figures == {"bandwidth_gbs": 0.1}
    assert read.ok and "no direct I/O" in read.value and "64 MiB" in read.value


def test_directory_that_takes_no_file():
    (found,) = disk.bandwidth(Path("/proc"))
    assert not found.ok and "/proc" in found.value


def test_gpudirect_needs_library_and_module(monkeypatch, tmp_path):
    monkeypatch.setattr("dataeff.storage.cufile.cufile_library", lambda: "libcufile.so.0")
    found = disk.gpudirect_storage(tmp_path)
    assert not found.ok and found.value == "missing: the kernel module nvidia-fs"
    (tmp_path / "driver/nvidia-fs").mkdir(parents=True)
    assert disk.gpudirect_storage(tmp_path).ok
    monkeypatch.setattr("dataeff.storage.cufile.cufile_library", lambda: None)
    assert "dataeff[gds]" in disk.gpudirect_storage(tmp_path).remedy


def test_engine_is_chosen_by_what_was_measured(monkeypatch, tmp_path):
    slow = Probe(1.0, 1.0, True, "ext4", "threads", 1 << 20, ())
    fast = Probe(4.0, 2.0, True, "ext4", "io_uring", 1 << 20, ())
    choice = Choice("io_uring", {"threads": slow, "io_uring": fast}, {}, "it is faster")
    monkeypatch.setattr("dataeff.storage.choice.choose_engine", lambda directory, device: choice)
    found = disk.engine(tmp_path)
    assert found.ok and found.value.startswith("io_uring (it is faster; threads: write 1.00")
    assert found.figures == {"threads_s_per_gb": 2.0, "io_uring_s_per_gb": 0.75}


def test_engine_in_a_directory_that_takes_no_file():
    found = disk.engine(Path("/proc"))
    assert not found.ok and "/proc" in found.value


def test_cufile_is_shown_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr("dataeff.storage.cufile_refusal", lambda directory: "no such luck")
    found = disk.cufile(tmp_path)
    assert not found.ok and found.value == "no such luck" and "pinned" in found.cost
    monkeypatch.setattr("dataeff.storage.cufile_refusal", lambda directory: None)
    assert disk.cufile(tmp_path).ok
