"""What `torch.ops.dataeff.rgnn_forward` and `rgnn_backward` do, for real and for fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dataeff._ops import library
from dataeff.rgnn.graph import graph_of
from dataeff.rgnn.plan import Plan, Request, plan_for
from dataeff.rgnn.view import View


def forward(
    inputs: Sequence[Tensor],
    token: Tensor,
    layer_id: int,
    spec: str,
    sizes: Sequence[int],
    wanted: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the layer, and values kept for backward."""
    plan = plan_for(Request.of(layer_id, spec, inputs, sizes, wanted))
    outputs, saved = plan.run_forward(View(graph_of(token), plan.sizes), inputs)
    return _distinct(outputs, inputs), _distinct(saved, [*inputs, *outputs])


def forward_fake(
    inputs: Sequence[Tensor],
    token: Tensor,
    layer_id: int,
    spec: str,
    sizes: Sequence[int],
    wanted: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Empty tensors of the right shapes."""
    plan = plan_for(Request.of(layer_id, spec, inputs, sizes, wanted))
    values = [
        _empty(plan, position, inputs[0]) for position in range(len(plan.compiled.forward.outputs))
    ]
    return values[: plan.compiled.num_outputs], values[plan.compiled.num_outputs :]


def backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    token: Tensor,
    layer_id: int,
    spec: str,
    sizes: Sequence[int],
    wanted: int,
) -> list[Tensor]:
    """Gradients of the wanted inputs."""
    plan = plan_for(Request.of(layer_id, spec, inputs, sizes, wanted))
    view = View(graph_of(token), plan.sizes)
    found = plan.run_backward(view, grads, inputs, outputs, saved)
    return _distinct(found, [*grads, *inputs, *outputs, *saved])


def backward_fake(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    token: Tensor,
    layer_id: int,
    spec: str,
    sizes: Sequence[int],
    wanted: int,
) -> list[Tensor]:
    """Empty gradients, contiguous like the real ones."""
    return [t.new_empty(t.shape) for i, t in enumerate(inputs) if wanted >> i & 1]


def _empty(plan: Plan, position: int, like: Tensor) -> Tensor:
    kind = plan.compiled.forward[plan.compiled.forward.outputs[position]].type
    if kind.domain == "one":
        return like.new_empty(kind.shape)
    rows = View.rows_of(plan.sizes, kind.domain)
    return like.new_empty((rows, *kind.shape))


def _distinct(values: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """An operator's results are contiguous and share no memory with its arguments or each other."""
    taken = {t.untyped_storage().data_ptr() for t in others if t.numel()}
    found = []
    for value in values:
        start = value.untyped_storage().data_ptr()
        alone = value.is_contiguous() and start not in taken
        found.append(value if alone else value.clone(memory_format=torch.contiguous_format))
        taken.add(found[-1].untyped_storage().data_ptr())
    return found


# The token is a CPU tensor whatever the device, so no single device key fits the call.
library.impl("rgnn_forward", forward, "CompositeExplicitAutograd")
library.impl("rgnn_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("dataeff::rgnn_forward", forward_fake)
torch.library.register_fake("dataeff::rgnn_backward", backward_fake)
