"""Whether a CUDA graph is being captured: then nothing may wait for a device or pin memory."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether the caller's current stream is being captured; starts no CUDA context."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
