"""Host memory that a layer's intermediate values use in turn, and that the next call finds again.

A large allocation comes from the system page by page: writing 52 MB for the first time took 5 to
13 ms on two cores of a virtual Zen 4 machine, and 1.8 ms where the pages were there, against 12 ms
for the product that fills them. Outputs and values kept for backward are never taken from here.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from dataeff.memory.huge_pages import on_huge_pages

SMALLEST_NBYTES = 4 << 20  # what malloc keeps by itself
KEPT_NBYTES = 512 << 20  # of blocks that no call uses


class Scratch:
    """Blocks of host memory between their uses; any thread may take and give."""

    def __init__(self) -> None:
        self._idle: list[Tensor] = []
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that are not in use."""
        with self._lock:
            return sum(b.nbytes for b in self._idle)

    def take(self, nbytes: int) -> Tensor:
        """A block of at least `nbytes`, and at most a quarter more; uint8, of any content.

        A new one takes the place of as many bytes of idle ones, so that blocks take no more memory,
        but for that quarter, than was in use at once.
        """
        with self._lock:
            fits = [b for b in self._idle if nbytes <= b.nbytes <= nbytes * 5 // 4]
            if fits:
                best = min(fits, key=lambda b: b.nbytes)
                self._idle = [b for b in self._idle if b is not best]
                return best
            room = nbytes
            while self._idle and room > 0:
                room -= self._idle.pop(0).nbytes
        return on_huge_pages(torch.empty(nbytes, dtype=torch.uint8))

    def give(self, block: Tensor) -> None:
        """Return a block; the blocks returned longest ago make room for it."""
        with self._lock:
            self._idle.append(block)
            while sum(b.nbytes for b in self._idle) > KEPT_NBYTES:
                self._idle.pop(0)

    def clear(self) -> None:
        """Give all idle blocks back to the system."""
        with self._lock:
            self._idle.clear()


SCRATCH = Scratch()
