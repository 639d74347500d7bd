"""Host memory: page-aligned buffers of an exact size, a pool, tensors that processes share."""

from __future__ import annotations

from dataeff.memory.host_buffer import HostBuffer
from dataeff.memory.pool import BufferPool, PooledBuffer
from dataeff.memory.ranks import share_all_among_ranks, share_among_ranks
from dataeff.memory.shared import SharedTensor, new_shared, share_

__all__ = [
    "BufferPool",
    "HostBuffer",
    "PooledBuffer",
    "SharedTensor",
    "new_shared",
    "share_",
    "share_all_among_ranks",
    "share_among_ranks",
]
