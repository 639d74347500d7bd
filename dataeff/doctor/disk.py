"""Files: io_uring, O_DIRECT, the bandwidth of a directory, GPUDirect Storage."""

from __future__ import annotations

import ctypes
import errno
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dataeff.bench.case import Unavailable
from dataeff.bench.ceilings import RawFile
from dataeff.doctor.finding import Finding

AREA = "files"
PROC = Path("/proc")
SYS_IO_URING_SETUP = 425  # the same on every architecture
IO_URING_PARAMS_NBYTES = 120
SAMPLE_NBYTES = 128 << 20
MAX_SAMPLES = 5
MAX_SECONDS = 2.0
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


def findings(directory: Path) -> list[Finding]:
    """io_uring, the file system of `directory`, its bandwidth, and GPUDirect Storage."""
    return [
        io_uring(PROC),
        file_system(directory, PROC),
        *bandwidth(directory),
        gpudirect_storage(PROC),
    ]


def io_uring_error() -> int:
    """0 when a ring can be set up, else the errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(IO_URING_PARAMS_NBYTES)
    fd = libc.syscall(SYS_IO_URING_SETUP, 2, params)
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def io_uring(proc: Path) -> Finding:
    """The kernel lets this process use io_uring."""
    error = io_uring_error()
    setting = proc / "sys/kernel/io_uring_disabled"
    disabled = setting.read_text().strip() if setting.exists() else "0"
    remedies = {
        errno.ENOSYS: "use Linux 5.6 or later, or a sandbox that passes io_uring through",
        errno.EPERM: "sudo sysctl kernel.io_uring_disabled=0"
        if disabled != "0"
        else "allow io_uring in the container's seccomp profile",
    }
    return Finding(
        "io_uring",
        ok=error == 0,
        value="available" if error == 0 else f"{errno.errorcode.get(error)}: {os.strerror(error)}",
        cost="the io_uring engine is off; the default engine (threads) is not affected",
        remedy=remedies.get(error, f"io_uring_setup failed: {os.strerror(error)}"),
        area=AREA,
    )


def file_system_type(directory: Path, proc: Path) -> str:
    """The type of the file system `directory` is on, from the longest matching mount."""
    target, deepest, kind = directory.resolve(), -1, "unknown"
    for line in (proc / "self/mountinfo").read_text().splitlines():
        mounted, _, described = line.partition(" - ")
        mount_point = Path(mounted.split()[4].encode().decode("unicode_escape"))
        # Of two mounts on one point the later covers the earlier.
        if target.is_relative_to(mount_point) and len(mount_point.parts) >= deepest:
            deepest, kind = len(mount_point.parts), described.split()[0]
    return kind


def file_system(directory: Path, proc: Path) -> Finding:
    """The directory is on a disk, not in memory."""
    kind = file_system_type(directory, proc)
    status = os.statvfs(directory)
    free_gib = status.f_bavail * status.f_frsize / (1 << 30)
    return Finding(
        "directory",
        ok=kind not in MEMORY_FILE_SYSTEMS,
        value=f"{directory} ({kind}, {free_gib:.0f} GiB free)",
        cost=f"{kind} is memory: what is offloaded to it still takes host memory",
        remedy="name a directory on an SSD: dataeff doctor --dir /path/on/nvme",
        area=AREA,
        figures={"path": str(directory), "file_system": kind, "free_gib": round(free_gib, 1)},
    )


def bandwidth(directory: Path) -> list[Finding]:
    """O_DIRECT works in the directory, and how fast it reads and writes."""
    try:
        raw = RawFile(directory, SAMPLE_NBYTES)
    except Unavailable as reason:
        return [
            Finding(
                "O_DIRECT",
                ok=False,
                value=str(reason),
                cost="files go through the page cache, which takes host memory and copies twice",
                remedy="name a directory on a local disk (ext4, xfs): dataeff doctor --dir PATH",
                area=AREA,
            )
        ]
    try:
        return [
            Finding("O_DIRECT", ok=True, value="available", area=AREA),
            _rate("write", "write bandwidth", raw.write, raw.nbytes),
            _rate("read", "read bandwidth", raw.read, raw.nbytes),
        ]
    finally:
        raw.close()


def _rate(way: str, name: str, transfer: Callable[[], None], nbytes: int) -> Finding:
    samples: list[float] = []
    deadline = time.perf_counter() + MAX_SECONDS
    while len(samples) < MAX_SAMPLES and (not samples or time.perf_counter() < deadline):
        start = time.perf_counter()
        transfer()
        samples.append(time.perf_counter() - start)
    bandwidth_gbs = nbytes / statistics.median(samples) / 1e9
    return Finding(
        name,
        ok=bandwidth_gbs >= 0.5,
        value=f"{bandwidth_gbs:.2f} GB/s, measured over {nbytes >> 20} MiB with O_DIRECT",
        cost=f"offloading waits for {way}s: below 0.5 GB/s even small models will",
        remedy="name a directory on an NVMe SSD with --dir, or several as spill=[...]",
        area=AREA,
        figures={"bandwidth_gbs": round(bandwidth_gbs, 3)},
    )


def cufile_library() -> str | None:
    """The cuFile library that can be loaded: the system's, else a Python package's."""
    packaged = [
        str(path)
        for folder in sys.path
        for path in Path(folder or ".").glob("nvidia/*/lib/libcufile.so.0")
    ]
    for name in ("libcufile.so.0", *packaged):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


def gpudirect_storage(proc: Path) -> Finding:
    """Both halves of GPUDirect Storage are there: the library and the kernel module."""
    library, module = cufile_library(), (proc / "driver/nvidia-fs").exists()
    missing = [
        name
        for name, there in (("libcufile", library), ("the kernel module nvidia-fs", module))
        if not there
    ]
    remedies = {
        "libcufile": "pip install 'dataeff[gds]'",
        "the kernel module nvidia-fs": "install nvidia-fs-dkms (a driver on native Linux)",
    }
    return Finding(
        "GPUDirect Storage",
        ok=not missing,
        value=f"{library} and nvidia-fs" if not missing else "missing: " + ", ".join(missing),
        cost="transfers between SSD and GPU pass through pinned host memory",
        remedy="; ".join(remedies[name] for name in missing),
        area=AREA,
    )
