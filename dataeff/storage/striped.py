"""Several directories as one place to spill to: the fast carry more, the broken are left out.

Extents, and the transfers that use them, belong to objects of the core: whoever drops a `Stripe` or
a `StripedRead`, an interrupt for example, ends its transfers, gives its extents back, and only then
lets go of the memory.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from dataeff import _core
from dataeff.storage.engine import open_engine
from dataeff.storage.spill import SpillFile

CHUNK_BYTES = 8 << 20


class StripedSpill:
    """Spill files in several directories, used as one.

    What is written is cut into chunks, and each chunk goes where it will be done first, by the
    bytes in flight and the rate that the directory has shown. Each directory has an engine of its
    own, so a slow disk holds up only its own chunks. A directory that is full is passed over, and
    one that fails three times is retired with one warning, unless it is the last; a chunk that
    could not be written is written elsewhere. Thread-safe.

    Args:
        directories: where to spill; one that cannot be used is left out with a warning.
        capacity_bytes: the most that each file may take.
        chunk_nbytes: size of the chunks; None keeps each write in one piece, in one directory.
        kind: engine of each directory, as `open_engine` takes it.
        num_threads: of each directory, as `open_engine` takes it.
        faults: faults to inject, one plan (or None) per directory.

    Attributes:
        files: the spill file of each directory.

    Raises:
        OSError: none of the directories can be used; the error is the last one's.
        ValueError: no directory is named, or `chunk_nbytes` is no positive multiple of 4096.
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
        self.files: list[SpillFile] = []
        self._core = _core.StripedSpill(chunk_nbytes)
        refused: list[tuple[str | os.PathLike[str], OSError]] = []
        for directory, plan in zip(directories, plans, strict=True):
            try:
                spill = SpillFile(directory, capacity_bytes, faults=plan)
            except OSError as error:
                refused.append((directory, error))
                continue
            self._core.add(spill.space, open_engine(kind, num_threads=num_threads, faults=plan))
            self.files.append(spill)
        if not self.files:
            raise refused[-1][1]
        for directory, cause in refused:
            text = f"nothing is spilled to {directory}: {cause.strerror}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def write(self, data_ptr: int, nbytes: int, source: object = None) -> _core.Stripe:
        """Starts to write `nbytes` from `data_ptr`.

        Args:
            data_ptr: where they are; they must stay until the stripe is written.
            nbytes: how many.
            source: what keeps them there: held until the write has ended.

        Raises:
            OSError: ENOSPC when no directory has room for a chunk; nothing is kept then.
        """
        return self._core.write(data_ptr, nbytes, source)

    @property
    def lanes(self) -> list[_core.SpillLane]:
        """How each directory does now."""
        return self._core.lanes()

    @property
    def used_nbytes(self) -> int:
        """Bytes of the extents that are out, in all directories."""
        return self._core.used

    @property
    def peak_nbytes(self) -> int:
        """The most that was out at one time."""
        return self._core.peak

    def close(self) -> None:
        """Ends all transfers and gives the space back."""
        self._core.close()

    def __enter__(self) -> StripedSpill:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
