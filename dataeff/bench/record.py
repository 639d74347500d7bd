"""Results in long format: one record per (workload, size, provider, metric), stored as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dataeff._version import __version__

PACKAGES = ("triton", "numpy", "torch-geometric", "cupy-cuda13x", "transformers")


@dataclass(frozen=True)
class Record:
    """One measured figure.

    Attributes:
        workload: name of the workload, e.g. `gather`.
        provider: who did the work, e.g. `dataeff`, `torch.index_select`.
        role: `ours`, `peer` or `ceiling`.
        metric: what was measured, e.g. `time_s`; `skipped` when the provider could not run.
        value: the figure; None when skipped.
        unit: of the value; `1` for a share or a count.
        size: the case, as `name=value` pairs.
        device: `cuda: NAME` or `cpu: NAME`.
        versions: package name -> version.
        commit: of the checkout that ran, with `-dirty` after uncommitted changes; else empty.
        time: when the run began, UTC, ISO 8601.
        threads: `torch.get_num_threads()`.
        load: what else ran: the load average per processor when the run began.
        note: why a provider was skipped.
        group: what the case is one size of; summaries are over a group.
    """

    workload: str
    provider: str
    role: str
    metric: str
    value: float | None
    unit: str
    size: str
    device: str
    versions: dict[str, str]
    commit: str
    time: str
    threads: int
    load: float = 0.0
    note: str = ""
    group: str = ""


@dataclass(frozen=True)
class Run:
    """What all records of one run share."""

    device: str
    versions: dict[str, str]
    commit: str
    time: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    threads: int = field(default_factory=torch.get_num_threads)
    load: float = field(default_factory=lambda: load_per_processor())

    @classmethod
    def here(cls, device: torch.device) -> Run:
        """Describes this machine, these packages and this checkout."""
        return cls(device=device_name(device), versions=versions(), commit=commit())

    def record(
        self,
        *,
        workload: str,
        provider: str,
        role: str,
        metric: str,
        value: float | None,
        unit: str,
        size: str,
        note: str = "",
        group: str = "",
    ) -> Record:
        """One figure of this run."""
        return Record(
            workload=workload,
            provider=provider,
            role=role,
            metric=metric,
            value=value,
            unit=unit,
            size=size,
            note=note,
            group=group,
            **asdict(self),
        )


def load_per_processor() -> float:
    """Programs running or waiting per processor, over the last minute."""
    return round(os.getloadavg()[0] / (os.cpu_count() or 1), 2)


def device_name(device: torch.device) -> str:
    """`cuda: NVIDIA H100 80GB HBM3`, or `cpu: ` and the processor's name."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {processor_name()}"


def processor_name() -> str:
    """The processor's name as the kernel gives it, else the architecture's."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the packages that take part; absent ones are left out.

    `vectors` are the widest of the CPU's that torch uses: virtual machines of one processor's name
    may have AVX-512 or hide it.
    """
    found = {"dataeff": __version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    found["vectors"] = torch.backends.cpu.get_cpu_capability()
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the checkout this package is imported from, or an empty string.

    DATAEFF_COMMIT names it for a copy of the tree without its history.
    """
    if named := os.environ.get("DATAEFF_COMMIT"):
        return named
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # A package installed under another project's checkout must not borrow its commit.
        if not git("ls-files", "_version.py"):
            return ""
        return git("describe", "--always", "--dirty", "--match=", "--abbrev=12")
    except FileNotFoundError:
        return ""


def write(records: Iterable[Record], path: str | Path) -> None:
    """Writes the records as a JSON list, one record per line."""
    lines = [json.dumps(asdict(record)) for record in records]
    Path(path).write_text("[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


def read(path: str | Path) -> list[Record]:
    """Reads what `write` wrote; raises ValueError naming the file when it is something else."""
    try:
        loaded: Any = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    known = {f.name for f in fields(Record)}
    needed = {f.name for f in fields(Record) if f.default is MISSING}
    if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
        raise ValueError(f"{path} does not hold a list of benchmark records")
    for row in loaded:
        if odd := (set(row) - known) | (needed - set(row)):
            raise ValueError(f"{path}: a record's fields differ from Record's in {sorted(odd)}")
    return [Record(**row) for row in loaded]
