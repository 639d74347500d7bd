"""The state of CUDA that calls depend on: a capture under way, the current device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def capturing() -> bool:
    """Whether the caller's current stream is being captured in a CUDA graph.

    Then nothing may wait for a device or pin memory. Starts no CUDA context.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one in a block, if it is a CUDA device.

    For what works on the current device, wherever its arguments are. CUDA's own way,
    `cudaSetDevice` and back, starts a context on the device that was current, which takes hundreds
    of MB there; torch goes back only where there is one.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
