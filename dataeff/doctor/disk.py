"""Files: io_uring, O_DIRECT, the bandwidth of a directory, GPUDirect Storage."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from dataeff.doctor.finding import Finding
from dataeff.doctor.kernel_files import text_of

AREA = "files"
PROC = Path("/proc")
SYS_IO_URING_SETUP = 425  # the same on every architecture
IO_URING_PARAMS_NBYTES = 120
SAMPLE_NBYTES = 128 << 20
MAX_SECONDS = 1.0  # for writes and for reads each


def findings(directory: Path) -> list[Finding]:
    """io_uring, the file system of `directory`, its bandwidth, and GPUDirect Storage."""
    return [
        io_uring(PROC),
        file_system(directory),
        *bandwidth(directory),
        engine(directory),
        gpudirect_storage(PROC),
        cufile(directory),
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
    disabled = (text_of(proc / "sys/kernel/io_uring_disabled") or "0").strip()
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


def file_system(directory: Path) -> Finding:
    """The directory is on a disk, not in memory."""
    from dataeff.storage import filesystem_of
    from dataeff.storage.bandwidth import MEMORY_FILE_SYSTEMS

    kind = filesystem_of(directory)
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
    from dataeff.storage import probe

    try:
        measured = probe(directory, SAMPLE_NBYTES, max_seconds=MAX_SECONDS)
    except OSError as error:
        return [
            Finding(
                "O_DIRECT",
                ok=False,
                value=str(error),
                cost="nothing can be offloaded to this directory",
                remedy="name a directory that you can write to: dataeff doctor --dir PATH",
                area=AREA,
            )
        ]
    notes = "".join(f"; {reason}" for reason in measured.reasons)
    return [
        Finding(
            "O_DIRECT",
            ok=measured.direct,
            value="available" if measured.direct else "not available",
            cost="files go through the page cache, which takes host memory and copies twice",
            remedy="name a directory on a local disk (ext4, xfs): dataeff doctor --dir PATH",
            area=AREA,
        ),
        _rate("write", measured.write_gbs, measured.nbytes, measured.engine + notes),
        _rate("read", measured.read_gbs, measured.nbytes, measured.engine + notes),
    ]


def _rate(way: str, bandwidth_gbs: float, nbytes: int, how: str) -> Finding:
    return Finding(
        f"{way} bandwidth",
        ok=bandwidth_gbs >= 0.5,
        value=f"{bandwidth_gbs:.2f} GB/s, measured over {nbytes >> 20} MiB (engine: {how})",
        cost=f"offloading waits for {way}s: below 0.5 GB/s even small models will",
        remedy="name a directory on an NVMe SSD with --dir, or several as spill=[...]",
        area=AREA,
        figures={"bandwidth_gbs": round(bandwidth_gbs, 3)},
    )


def engine(directory: Path) -> Finding:
    """Which engine `engine="auto"` takes for `directory`, and what each has shown."""
    import torch

    from dataeff.storage.choice import choose_engine, seconds_per_gb

    try:
        choice = choose_engine(directory, device="cuda" if torch.cuda.is_available() else "cpu")
    except OSError as error:
        return Finding("engine", ok=False, value=str(error), area=AREA)
    shown = [
        f"{kind}: write {made.write_gbs:.2f}, read {made.read_gbs:.2f} GB/s"
        for kind, made in choice.probes.items()
    ]
    shown += [f"{kind}: {why}" for kind, why in choice.refusals.items()]
    return Finding(
        "engine",
        ok=True,
        value=f"{choice.kind} ({choice.reason}; {'; '.join(shown)})",
        area=AREA,
        figures={f"{k}_s_per_gb": round(seconds_per_gb(p), 3) for k, p in choice.probes.items()},
    )


def cufile(directory: Path) -> Finding:
    """A file in `directory` goes to GPU memory and back by cuFile, without host memory between."""
    from dataeff.storage import cufile_refusal

    refused = cufile_refusal(directory)
    return Finding(
        "cuFile",
        ok=refused is None,
        value="works between this directory and the GPU" if refused is None else refused,
        cost="transfers between SSD and GPU pass through pinned host memory",
        remedy="see GPUDirect Storage; the disk must be local NVMe, the file system ext4 or xfs",
        area=AREA,
    )


def gpudirect_storage(proc: Path) -> Finding:
    """Both halves of GPUDirect Storage are there: the library and the kernel module."""
    from dataeff.storage.cufile import cufile_library

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
