"""The gather of learnable rows as compiled code calls it: outside its graph.

A compiled graph has no sparse gradients, so it breaks here and goes on behind. Loaded by the
compiler's trace alone: `torch.compiler.disable` imports TorchDynamo, which takes over a second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataeff.features.row_gradient import GatherRows, tell_coalesced


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gather_outside_graph(weight: Tensor, index: Tensor, padding_idx: int | None) -> Tensor:
    """`weight[index]` with sparse gradients."""
    tell_coalesced(weight)
    rows: Tensor = GatherRows.apply(weight, index, True, padding_idx)  # type: ignore[no-untyped-call]
    return rows
