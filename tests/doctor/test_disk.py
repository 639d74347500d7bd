import errno

import pytest

from dataeff.bench.case import Unavailable
from dataeff.doctor import disk


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


MOUNTS = """\
1 0 8:1 / / rw - ext4 /dev/sda1 rw
2 1 0:5 / {0} rw shared:7 - ext4 /dev/sdb rw
3 1 0:6 / {0} rw - tmpfs tmpfs rw
4 1 0:7 / {0}/with\\040space rw - xfs /dev/sdc rw
"""


def test_file_system_is_of_the_deepest_and_latest_mount(tmp_path):
    proc, spaced = tmp_path / "proc", tmp_path / "with space" / "inner"
    (proc / "self").mkdir(parents=True)
    spaced.mkdir(parents=True)
    (proc / "self/mountinfo").write_text(MOUNTS.format(tmp_path))
    assert disk.file_system_type(tmp_path, proc) == "tmpfs"
    assert disk.file_system_type(spaced, proc) == "xfs"
    assert disk.file_system_type(tmp_path.parent, proc) == "ext4"
    found = disk.file_system(tmp_path, proc)
    assert not found.ok and "tmpfs is memory" in found.cost


def test_bandwidth_is_measured_and_leaves_no_file(tmp_path):
    found = {finding.name: finding for finding in disk.bandwidth(tmp_path)}
    if not found["O_DIRECT"].ok:
        pytest.skip(found["O_DIRECT"].value)
    assert found["write bandwidth"].figures["bandwidth_gbs"] > 0
    assert found["read bandwidth"].figures["bandwidth_gbs"] > 0
    assert list(tmp_path.iterdir()) == []


def test_directory_without_o_direct(monkeypatch, tmp_path):
    def refuses(directory, nbytes):
        raise Unavailable("no unnamed O_DIRECT file")

    monkeypatch.setattr(disk, "RawFile", refuses)
    (found,) = disk.bandwidth(tmp_path)
    assert found.name == "O_DIRECT" and not found.ok and "--dir" in found.remedy


def test_gpudirect_needs_library_and_module(monkeypatch, tmp_path):
    monkeypatch.setattr(disk, "cufile_library", lambda: "libcufile.so.0")
    found = disk.gpudirect_storage(tmp_path)
    assert not found.ok and found.value == "missing: the kernel module nvidia-fs"
    (tmp_path / "driver/nvidia-fs").mkdir(parents=True)
    assert disk.gpudirect_storage(tmp_path).ok
    monkeypatch.setattr(disk, "cufile_library", lambda: None)
    assert "dataeff[gds]" in disk.gpudirect_storage(tmp_path).remedy


def test_library_from_a_package_that_does_not_load_is_not_counted(monkeypatch, tmp_path):
    library = tmp_path / "nvidia/cu13/lib/libcufile.so.0"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"not a library")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert disk.cufile_library() in (None, "libcufile.so.0")
