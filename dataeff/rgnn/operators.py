"""What `torch.ops.dataeff.rgnn_forward` and `rgnn_backward` do.

For real tensors, for fake ones whose sizes may be symbols (`torch.compile`), and for batches of
`torch.func.vmap`, which run one after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dataeff._ops import library
from dataeff.rgnn import batched
from dataeff.rgnn.graph import Graph, graph_of
from dataeff.rgnn.plan import Plan, Request, plan_for
from dataeff.rgnn.profile import NUM_COUNTS
from dataeff.rgnn.view import View


def forward(
    inputs: Sequence[Tensor],
    token: Tensor,
    layer_id: int,
    spec: str,
    sizes: Sequence[int],
    wanted: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the layer, values kept for backward, and last what `_keeping` says of it."""
    plan = plan_for(Request.of(layer_id, spec, inputs, sizes, wanted))
    graph = graph_of(token)
    with _as_given(inputs[0].device.type):
        outputs, saved = plan.run_forward(View(graph, plan.sizes), inputs)
    results = _distinct(outputs, inputs)
    saved = _distinct(saved, [*inputs, *outputs])
    return results, [*saved, _keeping(graph, plan)] if wanted else saved


def forward_fake(
    inputs: Sequence[Tensor],
    token: Tensor,
    layer_id: int,
    spec: str,
    sizes: Sequence[int],
    wanted: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Empty tensors of the right shapes."""
    plan = plan_for(_request_of_symbols(layer_id, spec, inputs, sizes, wanted))
    for op in plan.traced.inputs:
        if op.type.domain == "one":  # all its sizes are in the program: let none be a symbol
            _ = [int(n) for n in inputs[plan.request.names.index(str(op.attrs[0]))].shape]
    values = [
        _empty(plan, position, inputs[0], sizes)
        for position in range(len(plan.compiled.forward.outputs))
    ]
    saved = values[plan.compiled.num_outputs :]
    if wanted:
        saved.append(_rows_alone(plan.compiled.reads_outputs))
    return values[: plan.compiled.num_outputs], saved


def _keeping(graph: Graph, plan: Plan) -> Tensor:
    """A tensor that keeps the graph; its rows are the bits of the outputs that backward reads.

    An operator returns tensors alone, and a compiled program saves them, no objects, for backward.
    """
    tensor = _rows_alone(plan.compiled.reads_outputs)
    tensor.graph = graph  # type: ignore[attr-defined]
    return tensor


def _rows_alone(number: int) -> Tensor:
    return torch.empty((number, 0), device="cpu")


def backward(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
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
    with _as_given(inputs[0].device.type):
        found = plan.run_backward(view, grads, inputs, outputs, saved[:-1])
    return _distinct(found, [*grads, *inputs, *outputs, *saved])


def backward_fake(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    token: Tensor,
    layer_id: int,
    spec: str,
    sizes: Sequence[int],
    wanted: int,
) -> list[Tensor]:
    """Empty gradients, contiguous like the real ones."""
    return [t.new_empty(t.shape) for i, t in enumerate(inputs) if wanted >> i & 1]


def _request_of_symbols(
    layer_id: int, spec: str, inputs: Sequence[Tensor], sizes: Sequence[int], wanted: int
) -> Request:
    """The request of a fake call.

    Row counts are read without fixing them, as the plan of a size profile is the same for all;
    widths of rows are in the program, so they are fixed.
    """
    return Request(
        layer_id,
        spec,
        tuple((*map(_example, t.shape[:1]), *map(int, t.shape[1:])) for t in inputs),
        inputs[0].dtype,
        inputs[0].device.type,
        tuple(map(_example, sizes)),
        wanted,
    )


def _example(size: Any) -> int:
    """The value that a symbol was made for."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else None
    return int(size if hint is None else hint)


def _empty(plan: Plan, position: int, like: Tensor, sizes: Sequence[int]) -> Tensor:
    value = plan.compiled.forward.outputs[position]
    kind = plan.compiled.forward[value].type
    if kind.domain == "one":
        return like.new_empty(kind.shape)
    known = (*sizes[:NUM_COUNTS], *plan.sizes[NUM_COUNTS:])
    dtype = plan.compiled.forward_runner.dtype_of(value)
    return like.new_empty((View.rows_of(known, kind.domain), *kind.shape), dtype=dtype)


def _distinct(values: Sequence[Tensor], others: Sequence[Tensor | None]) -> list[Tensor]:
    """An operator's results are contiguous and share no memory with its arguments or each other."""
    taken = {t.untyped_storage().data_ptr() for t in others if t is not None and t.numel()}
    found = []
    for value in values:
        start = value.untyped_storage().data_ptr()
        alone = value.is_contiguous() and start not in taken
        found.append(value if alone else value.clone(memory_format=torch.contiguous_format))
        taken.add(found[-1].untyped_storage().data_ptr())
    return found


def _as_given(device: str) -> Any:
    """Compute in the dtypes that are at hand: autocast acts on a layer's arguments, not inside."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


# The token is a CPU tensor whatever the device, so no single device key fits the call.
library.impl("rgnn_forward", forward, "CompositeExplicitAutograd")
library.impl("rgnn_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("dataeff::rgnn_forward", forward_fake)
torch.library.register_fake("dataeff::rgnn_backward", backward_fake)
batched.register("rgnn_forward")
batched.register("rgnn_backward")
