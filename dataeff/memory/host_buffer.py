"""Page-aligned host memory of an exact size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from dataeff import _core


class HostBuffer(_core.HostBuffer):
    """Host memory of exactly `nbytes` bytes that starts on a page and is zero at first.

    It is committed page by page as it is touched. The last page is padded (`capacity_nbytes`), so
    direct I/O may use whole blocks. Buffers of 2 MiB or more start on a huge page and ask for huge
    pages. Supports the buffer protocol (`memoryview(buffer)`) and `with`.

    Args:
        nbytes: how many bytes.
        shared: a memfd that other processes can map (`fd`, `attach`) and forked children share;
            anonymous memory otherwise.
        inherited: whether forked children have anonymous memory, as it is at the fork. A child
            that touches what it has not dies of SIGSEGV.

    Raises:
        OSError: the kernel has no such memory.
        ValueError: `nbytes` is no size.
    """

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> HostBuffer:
        """Maps the memory of another process's shared buffer, given its `fd` and `nbytes`."""
        return cls(nbytes, fd=fd)

    def tensor(
        self, dtype: torch.dtype = torch.uint8, shape: Sequence[int] | None = None
    ) -> torch.Tensor:
        """A CPU tensor over this memory, which lives as long as the tensor does.

        Args:
            dtype: how to read the bytes.
            shape: default: one dimension, as many whole elements as fit. A smaller one views the
                beginning.

        Raises:
            ValueError: the shape needs more bytes than there are, or the buffer is closed.
        """
        return tensor_over(memoryview(self), dtype, shape)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a HostBuffer is memory, not a value: send a shared one through multiprocessing, or "
            "pickle buffer.tensor(), which copies it"
        )

    def __enter__(self) -> HostBuffer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "HostBuffer(closed)"
        return f"HostBuffer(nbytes={self.nbytes}, data_ptr={self.data_ptr:#x})"


def tensor_over(view: memoryview, dtype: torch.dtype, shape: Sequence[int] | None) -> torch.Tensor:
    """A tensor over the first bytes of `view`, keeping it alive.

    Raises:
        ValueError: the shape needs more bytes than there are.
    """
    if shape is None:
        shape = (view.nbytes // dtype.itemsize,)
    num_elements = 1
    for size in shape:
        num_elements *= size
    if num_elements * dtype.itemsize > view.nbytes:
        raise ValueError(
            f"shape {tuple(shape)} of {dtype} needs {num_elements * dtype.itemsize} bytes, "
            f"the buffer has {view.nbytes}"
        )
    if num_elements == 0:  # torch.frombuffer refuses empty buffers
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    return torch.frombuffer(view, dtype=dtype, count=num_elements).view(tuple(shape))
