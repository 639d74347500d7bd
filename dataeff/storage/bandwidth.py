"""How fast a directory is: a short measurement with the engine that will be used."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dataeff import _core
from dataeff.memory import HostBuffer
from dataeff.storage.engine import open_engine
from dataeff.storage.spill import SpillFile

TRANSFER_BYTES = 4 << 20
NUM_IN_FLIGHT = 8
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Probe:
    """What a directory can do.

    Attributes:
        read_gbs: 1e9 bytes read per second.
        write_gbs: 1e9 bytes written per second, over blocks that had been written before.
        direct: whether the page cache was bypassed.
        filesystem: type of the file system, as the kernel names it.
        engine: the kind of engine that moved the bytes.
        nbytes: how much of the disk was used.
        reasons: what makes the figures less than they seem, one sentence each; usually empty.
    """

    read_gbs: float
    write_gbs: float
    direct: bool
    filesystem: str
    engine: str
    nbytes: int
    reasons: tuple[str, ...]


def probe(
    directory: str | os.PathLike[str],
    nbytes: int = 256 << 20,
    *,
    max_seconds: float = 2.0,
    kind: str = "threads",
    num_threads: int = 4,
    device: torch.device | str = "cpu",
) -> Probe:
    """Writes and reads an unnamed file of `nbytes` again and again, and takes the average.

    Args:
        directory: where.
        nbytes: size of the file; at most a quarter of what is free is taken.
        max_seconds: how long to write, and how long to read; a third of it more for the untimed
            first pass, in which the file system assigns the blocks.
        kind: engine, as `open_engine` takes it.
        num_threads: as `open_engine` takes it.
        device: whose memory is written and read; a GPU's only by the engine `cufile`.

    Raises:
        OSError: the directory is missing, not writable, full.
    """
    path = Path(directory)
    reasons = []
    status = os.statvfs(path)
    allowed = status.f_bavail * status.f_frsize // 4
    if nbytes > allowed:
        reasons.append(f"only {allowed} bytes were written: little space is left in {path}")
    num_transfers = max(min(nbytes, allowed) // TRANSFER_BYTES, 1)
    with SpillFile(path) as spill, open_engine(kind, num_threads=num_threads) as engine:
        extent = spill.allocate(num_transfers * TRANSFER_BYTES)
        with _random_bytes(NUM_IN_FLIGHT * TRANSFER_BYTES, torch.device(device)) as memory:
            run = _Run(engine, spill, extent.offset, num_transfers, memory.data_ptr())
            written = run.once(engine.write, max_seconds / 3)
            run.num_transfers = max(written, 1)
            if written < num_transfers:
                reasons.append(
                    f"only {written * TRANSFER_BYTES} bytes were used: more took too long"
                )
            write_gbs = run.rate_gbs(engine.write, max_seconds)
            read_gbs = run.rate_gbs(engine.read, max_seconds)
        if not spill.direct:
            reasons.append(f"{path} has no direct I/O: the page cache is part of the figures")
        filesystem = filesystem_of(path)
        if filesystem in MEMORY_FILE_SYSTEMS:
            reasons.append(f"{filesystem} is memory: what is written there frees none")
        return Probe(
            read_gbs=read_gbs,
            write_gbs=write_gbs,
            direct=spill.direct,
            filesystem=filesystem,
            engine=engine.name,
            nbytes=run.num_transfers * TRANSFER_BYTES,
            reasons=tuple(reasons),
        )


@contextmanager
def _random_bytes(nbytes: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Memory that disks that compress get no gift with: [nbytes], uint8, page-aligned on a CPU."""
    with HostBuffer(nbytes) as buffer:
        memoryview(buffer)[:] = os.urandom(nbytes)
        if device.type == "cpu":
            yield buffer.tensor()
        else:
            memory = buffer.tensor().to(device)
            torch.cuda.synchronize(device)  # cuFile is not ordered with any stream
            yield memory


@dataclass
class _Run:
    """Passes over the first `num_transfers` pieces of the extent, a few in flight at a time."""

    engine: _core.Engine
    spill: SpillFile
    offset: int
    num_transfers: int
    address: int

    def once(
        self, order: Callable[[int, int, int, int], _core.Transfer], max_seconds: float
    ) -> int:
        """One pass, or as much of it as there is time for; returns how many transfers it made."""
        deadline = time.perf_counter() + max_seconds
        in_flight: list[_core.Transfer] = []
        num_begun = 0
        while num_begun < self.num_transfers and (not num_begun or time.perf_counter() < deadline):
            if len(in_flight) == NUM_IN_FLIGHT:
                in_flight.pop(0).wait()  # its place in the buffer is the next one's
            place = self.address + num_begun % NUM_IN_FLIGHT * TRANSFER_BYTES
            offset = self.offset + num_begun * TRANSFER_BYTES
            in_flight.append(order(self.spill.fd, place, TRANSFER_BYTES, offset))
            num_begun += 1
        for transfer in in_flight:
            transfer.wait()
        if order == self.engine.write and not self.spill.direct:
            os.fdatasync(self.spill.fd)
        return num_begun

    def rate_gbs(
        self, order: Callable[[int, int, int, int], _core.Transfer], max_seconds: float
    ) -> float:
        """Bytes per nanosecond over as many passes as there is time for, at least a part of one."""
        num_moved, elapsed_s = 0, 0.0
        while elapsed_s < max_seconds:
            if order == self.engine.read and not self.spill.direct:
                os.posix_fadvise(self.spill.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            num_moved += self.once(order, max_seconds - elapsed_s)
            elapsed_s += time.perf_counter() - start
        return num_moved * TRANSFER_BYTES / elapsed_s / 1e9


def filesystem_of(directory: str | os.PathLike[str]) -> str:
    """The type of the file system that `directory` is on, e.g. `ext4`; `unknown` without /proc."""
    target, kind, depth = Path(directory).resolve(), "unknown", -1
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return kind
    for line in mounts:
        mount, _, described = line.partition(" - ")
        # Spaces in a mount point are written as \040.
        point = Path(mount.split()[4].encode().decode("unicode_escape"))
        # Of two mounts on the same point the later one hides the earlier.
        if target.is_relative_to(point) and len(point.parts) >= depth:
            kind, depth = described.split()[0], len(point.parts)
    return kind
