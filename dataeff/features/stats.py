"""What a table has delivered, and from which tier."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from dataeff.ledger import Ledger, Tier


@dataclass(frozen=True)
class DiskStats:
    """What a table on disk has read.

    Attributes:
        num_cache_rows: rows that its cache holds when it is full.
        num_hits: rows delivered from the cache.
        num_misses: rows delivered from the files.
        num_reads: requests to the files; several rows may share one.
        nbytes_read: bytes of those requests, whole blocks of direct I/O.
    """

    num_cache_rows: int
    num_hits: int
    num_misses: int
    num_reads: int
    nbytes_read: int


@dataclass(frozen=True)
class TableStats:
    """Counts since the table was made: proof of what moved.

    Attributes:
        num_gathers: gathers carried out, prefetches and indexings among them.
        num_rows: rows they delivered; with `unique=True`, the different ones.
        nbytes: bytes that moved, by way: `"host->host"`, `"host->device"`, and of hot rows
            `"device->device"`. Of rows kept small they are the small ones, with their scales.
        num_hot_rows: rows found among the hot ones, on whichever device.
        disk: hits, reads and their bytes, of a table on disk.
    """

    num_gathers: int
    num_rows: int
    nbytes: dict[str, int] = field(default_factory=dict)
    num_hot_rows: int = 0
    disk: DiskStats | None = None


class Account(Ledger):
    """A table's running account; thread-safe.

    Attributes:
        tally: the address at which the core counts gathers from host memory to host memory, their
            rows and their bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._in_host = array("q", (0, 0, 0))
        self.tally, _ = self._in_host.buffer_info()
        self._num_gathers = 0
        self._num_rows = 0
        self.disk: DiskStats | None = None
        self._num_hot_rows = 0

    def gathered(self, num_rows: int, source: Tier, target: Tier, nbytes: int) -> None:
        """Enters one gather."""
        with self._lock:
            self._enter(source, target, nbytes)
            self._num_gathers += 1
            self._num_rows += num_rows

    def counted(self, num_rows: int) -> None:
        """Enters one gather whose bytes are entered apart."""
        with self._lock:
            self._num_gathers += 1
            self._num_rows += num_rows

    def found_hot(self, num_rows: int) -> None:
        """Enters rows that were found among the hot ones."""
        with self._lock:
            self._num_hot_rows += num_rows

    def stats(self) -> TableStats:
        """The counts so far."""
        moved = {
            (source, target): self.nbytes(source, target)
            for source in Tier
            for target in Tier
            if self.count(source, target)
        }
        num_gathers, num_rows, nbytes = self._in_host
        if num_gathers:
            way = (Tier.HOST, Tier.HOST)
            moved[way] = moved.get(way, 0) + nbytes
        with self._lock:
            return TableStats(
                self._num_gathers + num_gathers,
                self._num_rows + num_rows,
                {f"{source.value}->{target.value}": n for (source, target), n in moved.items()},
                self._num_hot_rows,
                disk=self.disk,
            )
