"""Whether somebody watches the operations of a call, so that none of them may be left out."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_watched() -> bool:
    """Whether gradients, tangents, a trace, a transform or a mode see what is done now."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
