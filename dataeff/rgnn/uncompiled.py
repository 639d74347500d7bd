"""Layer calls that torch.compile leaves to Python.

Loaded by the compiler's trace alone: `torch.compiler.disable` imports TorchDynamo, which takes over
a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

REMEDY = (
    "torch.compile has no gradient of a relational layer within torch.func's transforms: leave out"
    " fullgraph, so that they run uncompiled, or differentiate by torch.autograd instead"
)


@torch.compiler.disable(reason=REMEDY)  # type: ignore[untyped-decorator]
def call_outside(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, with no part of it compiled."""
    return function(*args)
