"""Several directories as one place to spill to: the fast carry more, the broken are left out."""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from dataeff import _core
from dataeff.storage.engine import open_engine
from dataeff.storage.spill import FULL, Extent, SpillFile

CHUNK_BYTES = 8 << 20
MAX_FAILURES = 3
NEWEST_WEIGHT = 0.2  # of the latest transfer in the running estimate of a lane's rate


@dataclass(eq=False)
class Lane:
    """One directory: its file, its engine, and how it does.

    Attributes:
        in_flight_nbytes: bytes on their way to or from it.
        written_nbytes: bytes written so far.
        rate: running estimate of one write's bytes per nanosecond; 0 before the first.
        num_failures: transfers that failed.
        retired: why nothing more is written to it; empty while it serves.
    """

    spill: SpillFile
    engine: _core.Engine
    in_flight_nbytes: int = 0
    written_nbytes: int = 0
    rate: float = 0.0
    num_failures: int = 0
    retired: str = ""


@dataclass(eq=False)
class _Part:
    """Bytes [begin, begin + nbytes) of what was written, in one lane."""

    lane: Lane
    extent: Extent
    begin: int
    nbytes: int

    @property
    def place(self) -> str:
        return f"offset {self.extent.offset} of the spill file in {self.lane.spill.path_hint}"


class StripedSpill:
    """Spill files in several directories, used as one.

    What is written is cut into chunks, and each chunk goes where it will be done first, by the
    bytes in flight and the rate that the directory has shown. Each directory has an engine of its
    own, so a slow disk holds up only its own chunks. A directory that is full is passed over, and
    one that fails `MAX_FAILURES` times is retired with one warning, unless it is the last; a chunk
    that could not be written is written elsewhere. Thread-safe.

    Args:
        directories: where to spill; one that cannot be used is left out with a warning.
        capacity_bytes: the most that each file may take.
        chunk_nbytes: size of the chunks; None keeps each write in one piece, in one directory.
        kind: engine of each directory, as `open_engine` takes it.
        num_threads: of each directory, as `open_engine` takes it.
        faults: faults to inject, one plan (or None) per directory.

    Attributes:
        peak_nbytes: the most bytes of extents that were out at one time, in all directories.

    Raises:
        OSError: none of the directories can be used; the error is the last one's.
    """

    def __init__(
        self,
        directories: Sequence[str | os.PathLike[str]],
        capacity_bytes: int | None = None,
        *,
        chunk_nbytes: int | None = CHUNK_BYTES,
        kind: str = "threads",
        num_threads: int = 4,
        faults: Sequence[_core.FaultPlan | None] | None = None,
    ) -> None:
        if not directories:
            raise ValueError("directories: at least one is needed")
        if chunk_nbytes is not None and (chunk_nbytes <= 0 or chunk_nbytes % 4096):
            raise ValueError(f"chunk_nbytes={chunk_nbytes} must be a positive multiple of 4096")
        plans = [None] * len(directories) if faults is None else faults
        self.chunk_nbytes = chunk_nbytes
        self.lanes: list[Lane] = []
        self.peak_nbytes = 0
        self._lock = threading.Lock()
        refused: list[tuple[str | os.PathLike[str], OSError]] = []
        for directory, plan in zip(directories, plans, strict=True):
            try:
                spill = SpillFile(directory, capacity_bytes)
            except OSError as error:
                refused.append((directory, error))
                continue
            engine = open_engine(kind, num_threads=num_threads, faults=plan)
            self.lanes.append(Lane(spill, engine))
        if not self.lanes:
            raise refused[-1][1]
        for directory, cause in refused:
            _warn(f"nothing is spilled to {directory}: {cause.strerror}")

    def write(self, data_ptr: int, nbytes: int) -> Stripe:
        """Starts to write `nbytes` from `data_ptr`, which must stay until the stripe is written.

        Raises:
            OSError: ENOSPC when no directory has room for a chunk; nothing is kept then.
        """
        stripe = Stripe(self, data_ptr, nbytes)
        chunk = self.chunk_nbytes or max(nbytes, 1)
        try:
            for begin in range(0, nbytes, chunk):
                part = self._place(begin, min(chunk, nbytes - begin), avoid=())
                stripe.parts.append(part)
        except OSError:
            stripe.free()
            raise
        stripe.start()
        return stripe

    def _place(self, begin: int, nbytes: int, avoid: Sequence[Lane]) -> _Part:
        """An extent in the lane that would be done with it first."""
        with self._lock:
            known = [lane.rate for lane in self.lanes if lane.rate]
            typical = sum(known) / len(known) if known else 1.0
            lanes = sorted(
                (lane for lane in self.lanes if not lane.retired and lane not in avoid),
                key=lambda lane: (lane.in_flight_nbytes + nbytes) / (lane.rate or typical),
            )
            refusals = []
            for lane in lanes:
                try:
                    extent = lane.spill.allocate(nbytes)
                except OSError as error:
                    if error.errno not in FULL:
                        self._note_failure(lane, error)
                    refusals.append(f"{lane.spill.path_hint}: {error.strerror}")
                    continue
                lane.in_flight_nbytes += nbytes
                self.peak_nbytes = max(self.peak_nbytes, self.used_nbytes)
                return _Part(lane, extent, begin, nbytes)
        why = "; ".join(refusals) or "none is left"
        raise OSError(errno.ENOSPC, f"no directory takes {nbytes} bytes more ({why})")

    def _note_failure(self, lane: Lane, error: OSError) -> None:
        lane.num_failures += 1
        others = any(not other.retired for other in self.lanes if other is not lane)
        if lane.num_failures >= MAX_FAILURES and others and not lane.retired:
            lane.retired = error.strerror or str(error)
            _warn(f"nothing more is spilled to {lane.spill.path_hint}: {lane.retired}")

    def _finished(self, part: _Part, transfer: _core.Transfer, error: OSError | None) -> None:
        """Enters a finished write in its lane's account."""
        with self._lock:
            part.lane.in_flight_nbytes -= part.nbytes
            if error is not None:
                self._note_failure(part.lane, error)
            elif not transfer.cancelled() and not transfer.failed():
                part.lane.written_nbytes += part.nbytes
                rate = part.nbytes / max(transfer.end_ns - transfer.start_ns, 1)
                weight = NEWEST_WEIGHT if part.lane.rate else 1.0
                part.lane.rate += weight * (rate - part.lane.rate)

    def _forget(self, part: _Part) -> None:
        with self._lock:
            part.lane.in_flight_nbytes -= part.nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes of the extents that are out, in all directories."""
        return sum(lane.spill.used_nbytes for lane in self.lanes)

    def close(self) -> None:
        """Ends all transfers and gives the space back."""
        for lane in self.lanes:
            lane.engine.close()
            lane.spill.close()

    def __enter__(self) -> StripedSpill:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Stripe:
    """What one `write` stored: a future while it is written, then a place to read from."""

    def __init__(self, owner: StripedSpill, data_ptr: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.parts: list[_Part] = []
        self._owner = owner
        self._data_ptr = data_ptr
        self._transfers: dict[_Part, _core.Transfer] = {}
        self._open: list[_Part] = []  # parts whose end is not entered in their lane's account
        self._failure: OSError | None = None
        self._lock = threading.Lock()

    def __del__(self) -> None:
        # Lost before anybody held it, by an interrupt: its space must not be lost with it.
        if hasattr(self, "_lock") and self.parts:
            self.free()

    def start(self) -> None:
        """Submits every part; called by `StripedSpill.write`."""
        for part in self.parts:
            self._submit(part)

    def _submit(self, part: _Part) -> None:
        address = self._data_ptr + part.begin
        self._transfers[part] = part.lane.engine.write(
            part.lane.spill.fd, address, part.nbytes, part.extent.offset
        )
        self._open.append(part)

    def done(self) -> bool:
        """Whether every part has ended, well or not."""
        for transfer in list(self._transfers.values()):  # noqa: SIM110 (asked at every hook)
            if not transfer.done():
                return False
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until everything is written; what a directory refused is written to another.

        Raises:
            OSError: no directory would take some part, or the stripe was cancelled. Every part has
                ended then.
            TimeoutError: not done in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            while self._open:
                part = self._open[0]
                left = None if deadline is None else max(deadline - time.monotonic(), 0)
                error = _outcome(self._transfers[part], left)
                self._open.pop(0)
                self._owner._finished(part, self._transfers[part], error)
                if error is not None:
                    self._write_elsewhere(part, error)
        if self._failure is not None:
            # A copy: one that is kept would keep the frames, and their tensors, that it went by.
            raise OSError(*self._failure.args)

    def _write_elsewhere(self, part: _Part, error: OSError) -> None:
        try:
            other = self._owner._place(part.begin, part.nbytes, avoid=[part.lane])
        except OSError:
            # What went wrong first is what the user has to know.
            self._failure = self._failure or error.with_traceback(None)
            return
        part.lane.spill.free(part.extent)
        del self._transfers[part]
        self.parts[self.parts.index(part)] = other
        self._submit(other)

    def cancel(self) -> bool:
        """Stops the write if no part of it has begun; True when nothing was or will be written."""
        if not self._lock.acquire(blocking=False):
            return False  # another thread is in `wait`, for as long as the disk takes
        try:
            stopped = []
            for part, transfer in self._transfers.items():
                if not transfer.cancel():
                    break
                stopped.append(part)
            if len(stopped) == len(self.parts):
                self._settle()
                self._failure = OSError(errno.ECANCELED, "the write was cancelled")
                return True
            for part in stopped:  # too late for the others, so these go on as well
                self._open.remove(part)
                self._submit(part)
            return False
        finally:
            self._lock.release()

    def read(self, data_ptr: int) -> StripedRead:
        """Starts to read everything to `data_ptr`; the write must have been waited for."""
        return StripedRead(
            [
                part.lane.engine.read(
                    part.lane.spill.fd, data_ptr + part.begin, part.nbytes, part.extent.offset
                )
                for part in self.parts
            ],
            [part.place for part in self.parts],
        )

    @property
    def place(self) -> str:
        """Where it begins, for messages."""
        return self.parts[0].place if self.parts else "no spill file"

    def free(self) -> None:
        """Gives the extents back; a write still under way is stopped, or else awaited.

        There is one where an interrupt came before anybody took note of it. No read may be.
        """
        with self._lock:
            for transfer in self._transfers.values():
                if not transfer.done() and not transfer.cancel():
                    _outcome(transfer, None)
            self._settle()
            while self.parts:
                part = self.parts.pop()
                if part not in self._transfers:  # placed, never submitted
                    self._owner._forget(part)
                part.lane.spill.free(part.extent)

    def _settle(self) -> None:
        for part in self._open:
            self._owner._finished(part, self._transfers[part], None)
        self._open.clear()

    @property
    def start_ns(self) -> int:
        """When the first part began; 0 before."""
        begun = [t.start_ns for t in self._transfers.values() if t.start_ns]
        return min(begun, default=0)

    @property
    def end_ns(self) -> int:
        """When the last part ended; 0 before."""
        return max((t.end_ns for t in self._transfers.values()), default=0) if self.done() else 0


@dataclass
class StripedRead:
    """A read of a whole stripe.

    Attributes:
        transfers: one per part.
        places: where each of them reads, for messages.
        failed_place: the place of the first that failed in `wait`.
    """

    transfers: list[_core.Transfer] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    failed_place: str = ""

    def done(self) -> bool:
        """Whether every part has ended."""
        for transfer in self.transfers:  # noqa: SIM110 (asked at every hook)
            if not transfer.done():
                return False
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for every part.

        Raises:
            OSError: a part could not be read; the text names the file, the offset and the cause.
            EOFError: a file ended too early.
            TimeoutError: not done in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        failure: OSError | EOFError | None = None
        for transfer, place in zip(self.transfers, self.places, strict=True):
            try:
                transfer.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
            except (OSError, EOFError) as error:
                if not transfer.done():
                    raise
                # The memory is free for others only when every part has ended.
                failure = failure or error
                self.failed_place = self.failed_place or place
        if failure is not None:
            raise failure

    @property
    def start_ns(self) -> int:
        """When the first part began; 0 before."""
        return min((t.start_ns for t in self.transfers if t.start_ns), default=0)

    @property
    def end_ns(self) -> int:
        """When the last part ended."""
        return max((t.end_ns for t in self.transfers), default=0)


def _outcome(transfer: _core.Transfer, timeout_s: float | None) -> OSError | None:
    """Waits; the error that a write ended with, or None. Raises TimeoutError."""
    try:
        transfer.wait(timeout_s)
    except OSError as error:
        if not transfer.done():  # the caller's patience, not the disk, is at its end
            raise
        # Its frames end in the caller's, which keeps the error: a cycle, and with it their tensors.
        return error.with_traceback(None)
    return None


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)
