"""The state of CUDA that calls depend on: a capture under way, the current device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch


def capturing() -> bool:
    """Whether the caller's current stream is being captured in a CUDA graph.

    Then nothing may wait for a device or pin memory. Starts no CUDA context.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(awaited: str, remedy: str) -> None:
    """RuntimeError, before the wait would end the capture, where one is under way.

    Args:
        awaited: what the caller is about to wait for.
        remedy: what to do instead.
    """
    if capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured, which cannot wait for {awaited}: {remedy}"
        )


POOLED_STREAMS = 32  # that torch has of a priority on each device, and hands out in turn


def capturing_anywhere(devices: Iterable[torch.device]) -> bool:
    """Whether a stream of these devices is being captured, by whichever thread.

    To wait for a device would end the capture then, and by default (`capture_error_mode="global"`)
    so would a query of an event, from other threads too: a collection of garbage may be in any.
    """
    return capturing() or any(
        captures(torch.cuda.Stream(device, priority))
        for device in devices
        for priority in (0, -1)
        for _ in range(POOLED_STREAMS)
    )


def captures(stream: torch.cuda.Stream) -> bool:
    """Whether a stream is being captured."""
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def current_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one in a block, if it is a CUDA device.

    For what works on the current device, wherever its arguments are. CUDA's own way,
    `cudaSetDevice` and back, starts a context on the device that was current, which takes hundreds
    of MB there; torch goes back only where there is one.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
