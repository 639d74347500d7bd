"""Host memory: how much, how much may be locked, and in which pages."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

from dataeff.doctor.finding import Finding
from dataeff.doctor.kernel_files import text_of

AREA = "host memory"
PROC = Path("/proc")
SYS = Path("/sys")
CAP_IPC_LOCK = 14
DEFAULT_MAX_MAP_COUNT = 65530


def findings() -> list[Finding]:
    """Kernel, memory, locking limit, huge pages, mappings."""
    return [
        kernel(),
        memory(PROC),
        locked_memory(PROC),
        huge_pages(SYS),
        map_count(PROC),
    ]


def kernel() -> Finding:
    """The kernel lets CUDA register existing memory; under WSL it does not."""
    release = platform.release()
    return Finding(
        "kernel",
        ok="microsoft" not in release.lower(),
        value=f"{platform.system()} {release}",
        cost="WSL cannot register memory in place: a GPU refuses to gather from host tables",
        remedy="run on native Linux, or give tables pinned memory: FeatureTable(x.pin_memory())",
        area=AREA,
    )


def memory(proc: Path) -> Finding:
    """How much host memory there is, and how much of it is free for tables."""
    text = text_of(proc / "meminfo")
    if text is None:
        return _hidden("memory", proc / "meminfo")
    rows = dict(line.split(":", 1) for line in text.splitlines())
    total_gib, available_gib = (
        int(rows[name].split()[0]) / (1 << 20) for name in ("MemTotal", "MemAvailable")
    )
    return Finding(
        "memory",
        ok=available_gib >= 0.1 * total_gib,
        value=f"{available_gib:.1f} of {total_gib:.1f} GiB available",
        cost="little room for feature tables and offloaded activations",
        remedy="end other programs, or keep features on disk: FeatureTable.open(path)",
        area=AREA,
        figures={"total_gib": round(total_gib, 2), "available_gib": round(available_gib, 2)},
    )


def may_lock_anything(proc: Path) -> bool:
    """Whether this process has CAP_IPC_LOCK, which lifts the limit on locked memory."""
    text = text_of(proc / "self" / "status") or ""
    rows = (line.split(":", 1) for line in text.splitlines())
    effective = next((value for name, value in rows if name == "CapEff"), "0")
    return bool(int(effective, 16) >> CAP_IPC_LOCK & 1)


def locked_memory(proc: Path) -> Finding:
    """RLIMIT_MEMLOCK does not stand in the way of pinned memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    privileged = may_lock_anything(proc)
    value = "unlimited" if unlimited else f"{soft / (1 << 20):.0f} MiB"
    return Finding(
        "lockable memory",
        ok=unlimited or privileged,
        value=value + (" (lifted: CAP_IPC_LOCK)" if privileged and not unlimited else ""),
        cost="larger tables may be refused when a GPU registers them, and io_uring on old kernels",
        remedy="ulimit -l unlimited, or `* - memlock unlimited` in /etc/security/limits.conf; "
        "in a container --ulimit memlock=-1",
        area=AREA,
        figures={} if unlimited else {"limit_nbytes": soft},
    )


def huge_pages(sys: Path) -> Finding:
    """Transparent huge pages can be asked for."""
    path = sys / "kernel/mm/transparent_hugepage/enabled"
    text = text_of(path)
    chosen = "not told" if text is None else text.partition("[")[2].partition("]")[0]
    return Finding(
        "transparent huge pages",
        ok=chosen in ("always", "madvise"),
        value=chosen,
        cost="large host tables use 4 KiB pages: pinning is slower and random rows miss the TLB",
        remedy=f"echo madvise | sudo tee {path}",
        area=AREA,
    )


def map_count(proc: Path) -> Finding:
    """A process may have as many memory mappings as Linux allows by default."""
    path = proc / "sys/vm/max_map_count"
    text = text_of(path)
    if text is None:
        return _hidden("vm.max_map_count", path)
    count = int(text)
    return Finding(
        "vm.max_map_count",
        ok=count >= DEFAULT_MAX_MAP_COUNT,
        value=str(count),
        cost="many host buffers or mapped files at once fail with 'Cannot allocate memory'",
        remedy="sudo sysctl vm.max_map_count=262144",
        area=AREA,
        figures={"count": count},
    )


def _hidden(name: str, path: Path) -> Finding:
    return Finding(name, ok=True, value=f"not told: {path} cannot be read", area=AREA)
