"""What a graph keeps for later calls must not be made while a CUDA graph is captured."""

from __future__ import annotations

import torch


def refuse_capture(device: torch.device, what: str) -> None:
    """Raises when the current stream of `device` is being captured.

    Kernels of a capture do not run, and their results belong to the captured graph's memory: what
    is kept would hold no values until the first replay, and other values after the next.

    Args:
        device: where `what` is about to be made.
        what: names it in the message.

    Raises:
        RuntimeError: a capture is under way.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} would be built inside a CUDA graph capture: run the layer once, forward and"
            " backward, on this rgnn.Graph before capturing it"
        )
