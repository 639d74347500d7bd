"""A pool of host memory: one slab, extents of exact size, a byte budget."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from dataeff import _core
from dataeff.memory.host_buffer import HostBuffer, tensor_over

_LOOK_S = 0.1  # how often a waiting `acquire` looks by itself


class PooledBuffer:
    """A page-aligned stretch of a pool's slab, of exactly `nbytes` bytes; its last page is padded.

    Hand it back with `release()` (or leave its `with` block) once no transfer and no tensor uses
    it: the memory goes to the next `acquire`. It goes back by itself when nothing holds this object
    any more.
    """

    __slots__ = ("_part", "_pool", "data_ptr", "nbytes", "offset")

    def __init__(self, pool: BufferPool, part: _core.SlabPart) -> None:
        self._part: _core.SlabPart | None = part
        self._pool = pool
        self.data_ptr, self.nbytes, self.offset = part.data_ptr, part.nbytes, part.offset

    def tensor(
        self, dtype: torch.dtype = torch.uint8, shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        """A CPU tensor over this memory; valid until `release()`.

        Raises:
            ValueError: the shape needs more bytes than there are, or the buffer was released.
        """
        if self._part is None:
            raise ValueError("this buffer was released")
        whole = memoryview(self._pool.buffer)
        return tensor_over(whole[self.offset : self.offset + self.nbytes], dtype, shape)

    def release(self) -> None:
        """Hands the memory back; a second call does nothing."""
        part, self._part = self._part, None
        if part is not None:
            part.release()
            self._pool._released()

    def __enter__(self) -> PooledBuffer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class BufferPool:
    """Reuses one slab of host memory for buffers of any size, without rounding to powers of two.

    The slab is mapped once and committed as it is touched; buffers are best-fit extents of it, in
    whole pages, so a step that asks for the same sizes as the step before finds its old places.
    Thread-safe.

    Args:
        budget_nbytes: size of the slab: the most that can be out at one time.
        shared: whether forked children and other processes share the memory.
        inherited: whether forked children have memory that is not shared. Of what is pinned each
            of them gets a copy at the fork.

    Attributes:
        buffer: the slab, for example to register it with CUDA as a whole.
        num_waits: calls of `acquire` that had to wait for memory.
    """

    def __init__(self, budget_nbytes: int, shared: bool = False, inherited: bool = True) -> None:
        self.buffer = HostBuffer(budget_nbytes, shared=shared, inherited=inherited)
        self.budget_nbytes = self.buffer.capacity_nbytes
        self.num_waits = 0
        self._slab = _core.Slab(self.buffer)
        self._changed = threading.Condition()
        self._closed = False

    def acquire(self, nbytes: int, timeout_s: float | None = None) -> PooledBuffer:
        """A buffer of `nbytes` bytes, its contents undefined; waits until one is free.

        Args:
            nbytes: how many bytes.
            timeout_s: the longest wait; 0 does not wait, None waits for ever.

        Raises:
            ValueError: more than the whole budget, or the pool is closed.
            TimeoutError: not free in time.
        """
        if nbytes > self.budget_nbytes:
            raise ValueError(f"{nbytes} bytes are more than the pool's {self.budget_nbytes}")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            waited = False
            while (part := self._try_take(nbytes)) is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(
                        f"no {nbytes} bytes free within {timeout_s} s: {self._slab.used} of "
                        f"{self.budget_nbytes} in use, largest free part "
                        f"{self._slab.largest_free}"
                    )
                self.num_waits += not waited
                waited = True
                # Nobody calls when a buffer goes back by itself.
                self._changed.wait(_LOOK_S if left is None else min(left, _LOOK_S))
            return PooledBuffer(self, part)

    def _try_take(self, nbytes: int) -> _core.SlabPart | None:
        if self._closed:
            raise ValueError("this BufferPool is closed")
        return self._slab.take(nbytes)

    def _released(self) -> None:
        with self._changed:
            self._changed.notify_all()

    @property
    def used_nbytes(self) -> int:
        """Bytes that are out now, in whole pages."""
        return self._slab.used

    @property
    def largest_free_nbytes(self) -> int:
        """The largest buffer that `acquire` would have at once."""
        return self._slab.largest_free

    @property
    def peak_nbytes(self) -> int:
        """The most that was out at one time."""
        return self._slab.peak

    def close(self) -> None:
        """Refuses further `acquire`; the slab is unmapped when the last tensor over it is gone."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.buffer.close()

    def __enter__(self) -> BufferPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
