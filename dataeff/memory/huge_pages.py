"""Large new tensors on 2 MiB pages: fewer faults when written, fewer table walks when gathered."""

from __future__ import annotations

from torch import Tensor

from dataeff import _core


def on_huge_pages(new: Tensor) -> Tensor:
    """Asks for huge pages under a tensor that nothing has written to yet, and returns it.

    Only host memory, and only from 4 MiB on. It is a wish: `madvise` may not grant it.
    """
    if new.device.type == "cpu":
        _core.prefer_huge_pages(new.data_ptr(), new.nbytes)
    return new
