"""Pages that hold one tensor and nothing else, for memory that is registered with a device.

A device registers whole pages. What else lies in the first and the last one is then registered in
part, and CUDA need not copy what is (CUDA Driver API, API synchronization behavior): the innocent
owner of such a tensor would be told of an invalid argument.
"""

from __future__ import annotations

import mmap
import warnings

import torch
from torch import Tensor

from dataeff import _core

# From here on malloc gives every request pages of its own: M_MMAP_THRESHOLD grows no further.
_OWN_FROM_NBYTES = 32 << 20


def move_to_own_pages(x: Tensor) -> None:
    """Moves a small tensor's storage out of the heap, in place, for all its views.

    Memory that torch did not allocate, that has its pages to itself already, that a NumPy array was
    made of, or that other code has registered stays where it is. Raw addresses that were taken
    before are void, as after `torch.Tensor.share_memory_`.

    Args:
        x: host memory.
    """
    storage = x.untyped_storage()
    if (
        not 0 < storage.nbytes() < _OWN_FROM_NBYTES
        or not storage.resizable()
        or storage.is_shared()
        or x.is_pinned()
        or _is_registered_in_part(storage)
    ):
        return
    try:
        storage.share_memory_()  # whole pages, mapped for it alone
    except RuntimeError as error:
        warnings.warn(
            f"{storage.nbytes()} bytes that a GPU is to read stay on pages that other tensors use "
            f"({error}): CUDA may refuse to copy those. Make more room in /dev/shm, or use pinned "
            "memory (x.pin_memory())",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_registered_in_part(storage: torch.UntypedStorage) -> bool:
    """Whether any page is registered already; asked only where that does not start CUDA."""
    if not torch.cuda.is_initialized():
        return False
    begin = storage.data_ptr()
    pages = range(begin, begin + storage.nbytes(), mmap.PAGESIZE)
    return any(_core.is_registered(page, 1) for page in pages)
