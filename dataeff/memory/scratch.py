"""Host memory that large values use in turn, and that the next call finds again.

A large allocation comes from the system page by page, and glibc gives back at once what is larger
than 32 MiB. Writing 52 MB for the first time took 5 to 13 ms on two cores of a virtual Zen 4
machine, and 1.8 ms where the pages were there, against 12 ms for the product that fills them. Where
the host has taken back what was free for two seconds it is worse: 427 MiB then took 1.05 s on one
core, and 0.05 s otherwise.

What a run needs for all its intermediate values together is taken and given; a block for a result
is lent, and comes back when no tensor uses it any more.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dataeff import _core
from dataeff.memory.huge_pages import on_huge_pages

SMALLEST_NBYTES = 4 << 20  # what malloc keeps by itself, between values that follow one another
SMALLEST_LENT_NBYTES = 32 << 20  # and from call to call
# Of blocks that nothing uses: so many bytes, and one part in so many of memory.
KEPT_NBYTES = 8 << 30
KEPT_SHARE = 4
CPU_DEVICE = 1  # DLPack's number
_ANY = (1 << 63) - 1


class Scratch:
    """Blocks of host memory between their uses; any thread may take and give.

    Args:
        kept_nbytes: the most that blocks which are not in use may take.
        roomy: a larger block does as well, however large, and a new one takes the place of all idle
            ones: for users that take one block at a time, of sizes that differ.
    """

    def __init__(self, kept_nbytes: int, *, roomy: bool = False) -> None:
        self.kept_nbytes = kept_nbytes
        self.roomy = roomy
        self._idle = _core.IdleBlocks(kept_nbytes)
        self._used: dict[int, _InUse] = {}  # by the `id` of the block
        self._most_nbytes = 0  # in use at most since `clear`
        self.forked()
        _all.add(self)

    def forked(self) -> None:
        """In a forked child, where the lock may stand locked by a thread that does not exist."""
        # A collection of garbage, which may come at any allocation, may run code that takes one.
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that are not in use."""
        return self._idle.nbytes

    @property
    def used_nbytes(self) -> int:
        """Bytes of the blocks that are in use."""
        return self._idle.lent_nbytes + sum(ref.nbytes for ref in list(self._used.values()))

    def take(self, nbytes: int) -> Tensor:
        """A block of at least `nbytes`; uint8, of any content.

        It is at most a quarter larger, if not roomy. Idle blocks make room for a new one, so that
        all take at most a quarter more memory than was in use at once.
        """
        with self._lock:
            block = self._find(nbytes)
            # Only what is really there is in use: the system may have refused.
            self._used[id(block)] = _InUse.of(block, self._used)
            self._most_nbytes = max(self._most_nbytes, self.used_nbytes)
            return block

    def _find(self, nbytes: int) -> Tensor:
        """An idle block, or a new one."""
        block: Tensor | None = self._idle.take(nbytes, _ANY if self.roomy else nbytes * 5 // 4)
        if block is None:
            used = self.used_nbytes + nbytes
            spare = max(used, self._most_nbytes) * 5 // 4 - used
            self._idle.shrink(0 if self.roomy else spare)
            block = on_huge_pages(torch.empty(nbytes, dtype=torch.uint8, device="cpu"))
        return block

    def give(self, block: Tensor) -> None:
        """Return a block; the blocks returned longest ago make room for it."""
        self._used.pop(id(block), None)
        self._idle.give(block, block.nbytes)

    def lend(self, nbytes: int) -> Tensor:
        """A tensor of `nbytes` bytes, uint8, of any content.

        Its memory is returned when neither it nor a view of it is left, without a line of Python.
        """
        with self._lock:
            block = self._find(nbytes)
            place = block.data_ptr()
            loan = _core.Loan(self._idle, block, block.nbytes)
            self._most_nbytes = max(self._most_nbytes, self.used_nbytes)
        lent: Tensor = from_dlpack(_core.alias_capsule(place, nbytes, CPU_DEVICE, 0, loan))
        return lent

    def clear(self) -> None:
        """Give all idle blocks back to the system."""
        with self._lock:
            self._idle.shrink(0)
            self._most_nbytes = self.used_nbytes


class _InUse(weakref.ref[Tensor]):
    """Counts a block for as long as it is there: one that an interrupt loses is in use no more."""

    __slots__ = ("nbytes",)

    nbytes: int

    @classmethod
    def of(cls, block: Tensor, used: dict[int, _InUse]) -> _InUse:
        """Leaves `used`, where it stands under the `id` of the block, when that goes."""
        key = id(block)
        ref = cls(block, lambda ref: used.pop(key, None))
        ref.nbytes = block.nbytes
        return ref


def memory_nbytes() -> int:
    """Host memory that this process may take: the machine's, or its control group's if less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:  # no group of the second version
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def kept_share() -> int:
    """The bytes that idle blocks may take on this machine."""
    return min(memory_nbytes() // KEPT_SHARE, KEPT_NBYTES)


_all: weakref.WeakSet[Scratch] = weakref.WeakSet()
SCRATCH = Scratch(kept_share())
ARENAS = Scratch(kept_share(), roomy=True)


_clears: list[Callable[[], None]] = []


def when_idle_is_cleared(clear: Callable[[], None]) -> Callable[[], None]:
    """Have `clear_idle` call this too, for memory that is kept to save time and nothing else."""
    _clears.append(clear)
    return clear


def clear_idle() -> None:
    """Give all that this process keeps for later calls back to the system."""
    for scratch in list(_all):
        scratch.clear()
    for clear in _clears:
        clear()


def _forked() -> None:
    for scratch in _all:
        scratch.forked()


os.register_at_fork(after_in_child=_forked)


def new_on_host(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)` of a tensor in host memory, for one to be written soon.

    A large one stands in memory that others have given up. Its storage cannot be resized then, as
    that of an array of NumPy cannot.
    """
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < SMALLEST_NBYTES:
        if dtype is like.dtype and shape:  # sizes one by one are read in half the time of a tuple
            return like.new_empty(*shape)
        return like.new_empty(shape, dtype=dtype)
    if nbytes < SMALLEST_LENT_NBYTES:
        return on_huge_pages(like.new_empty(shape, dtype=dtype))
    return SCRATCH.lend(nbytes).view(dtype).view(shape)
