"""Host memory: page-aligned buffers of an exact size, and a pool that reuses them."""

from __future__ import annotations

from dataeff.memory.host_buffer import HostBuffer
from dataeff.memory.pool import BufferPool, PooledBuffer

__all__ = ["BufferPool", "HostBuffer", "PooledBuffer"]
