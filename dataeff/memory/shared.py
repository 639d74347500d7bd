"""Tensors in memory that other processes can map: one copy for all of them.

The memory is a memfd: it has no name, so the size of /dev/shm does not matter and nothing stays
behind whoever dies; the kernel counts the processes that hold it. What travels between processes is
its descriptor.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

import torch
from torch import Tensor

from dataeff.memory.host_buffer import HostBuffer

_lock = threading.Lock()
# The shared buffers that this process has mapped, by their first address, which is that of every
# storage made over them, and by the identity of their memfd, so that it is mapped only once.
_by_address: weakref.WeakValueDictionary[int, HostBuffer] = weakref.WeakValueDictionary()
_by_inode: weakref.WeakValueDictionary[tuple[int, int], HostBuffer] = weakref.WeakValueDictionary()


def _entered(buffer: HostBuffer) -> HostBuffer:
    status = os.fstat(buffer.fd)
    _by_address[buffer.data_ptr] = buffer
    _by_inode[status.st_dev, status.st_ino] = buffer
    return buffer


def new_shared(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros in shared memory of its own, committed as it is written.

    Fill it in place to load features that fit the memory only once.

    Raises:
        OSError: the kernel has no such memory.
    """
    buffer = HostBuffer(torch.Size(shape).numel() * dtype.itemsize, shared=True)
    with _lock:
        _entered(buffer)
    return buffer.tensor(dtype, shape)


def shared_buffer(x: Tensor) -> HostBuffer | None:
    """The shared buffer that a tensor's memory lies in; None for any other memory."""
    if x.device.type != "cpu" or not x.untyped_storage().nbytes():
        return None
    with _lock:
        buffer = _by_address.get(x.untyped_storage().data_ptr())
    return None if buffer is None or buffer.closed else buffer


def share_(x: Tensor) -> Tensor:
    """Moves a tensor into shared memory, in place; one that is there already stays as it is.

    As with `torch.Tensor.share_memory_`, `x` remains the same tensor but its memory moves: views
    and arrays that were made of it before keep the old memory. The copy is made once.

    Args:
        x: any dtype, shape and strides, host memory. A tensor whose rows lie apart becomes
            contiguous.

    Returns:
        `x`.

    Raises:
        TypeError: `x` is no tensor.
        ValueError: `x` is not in host memory, or is the result of a computation that autograd
            recorded.
        OSError: the kernel has no such memory.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"a tensor is shared, got a {type(x).__name__}: torch.as_tensor(x)")
    if x.device.type != "cpu":
        raise ValueError(f"host memory is shared, but the tensor is on {x.device}: x.cpu()")
    if not x.is_leaf:
        raise ValueError("autograd recorded how x was made, so its memory stays: x.detach()")
    if shared_buffer(x) is None and x.numel():
        moved = new_shared(x.shape, x.dtype)
        moved.copy_(x.detach())
        x.data = moved
    return x


# --- between processes ----------------------------------------------------------------------------


def attach_shared(fd: int, nbytes: int) -> HostBuffer:
    """The buffer behind a descriptor, mapped once per process; `fd` stays the caller's.

    Raises:
        ValueError: fewer bytes are behind `fd`.
        OSError: `fd` is no open descriptor.
    """
    status = os.fstat(fd)
    with _lock:
        known = _by_inode.get((status.st_dev, status.st_ino))
        if known is not None and not known.closed:
            return known
        return _entered(HostBuffer.attach(fd, nbytes))


def _receive(descriptor: Any, nbytes: int) -> HostBuffer:
    fd = descriptor.detach()
    try:
        return attach_shared(fd, nbytes)
    finally:
        os.close(fd)


def _send(buffer: HostBuffer) -> tuple[Callable[..., HostBuffer], tuple[Any, ...]]:
    if buffer.fd < 0:
        raise TypeError(
            "this HostBuffer is private to its process: make it with HostBuffer(nbytes, "
            "shared=True) to send it to another"
        )
    return _receive, (DupFd(buffer.fd), buffer.nbytes)


ForkingPickler.register(HostBuffer, _send)


class SharedTensor:
    """How a tensor in shared memory travels to another process: its buffer and its layout.

    Pickled by `multiprocessing` (arguments of a process, queues, data-loader workers) it sends the
    descriptor, not the bytes.

    Args:
        x: a tensor in host memory, moved into shared memory if it is not there.
    """

    def __init__(self, x: Tensor) -> None:
        x = share_(x).detach()
        self.buffer = shared_buffer(x)  # None without elements
        self.dtype = x.dtype
        self.layout = (tuple(x.shape), x.stride(), x.storage_offset())

    def tensor(self) -> Tensor:
        """The tensor, over the same memory, in whichever process this is."""
        shape, stride, offset = self.layout
        if self.buffer is None:
            return torch.empty_strided(shape, stride, dtype=self.dtype, device="cpu")
        return self.buffer.tensor(self.dtype).as_strided(shape, stride, offset)
