"""The layer's operators under autograd and torch.func."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Apply(torch.autograd.Function):
    """The layer's operator with the generated backward program behind it."""

    @staticmethod
    def forward(
        token: Tensor, layer_id: int, spec: str, sizes: list[int], wanted: int, *inputs: Tensor
    ) -> tuple[Any, ...]:
        """Outputs, then what backward needs, then how many outputs there are."""
        outputs, saved = torch.ops.dataeff.rgnn_forward(
            list(inputs), token, layer_id, spec, sizes, wanted
        )
        return (*outputs, *saved, len(outputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save for backward."""
        token, ctx.layer_id, ctx.spec, ctx.sizes, ctx.wanted, *tensors = inputs
        ctx.num_inputs, ctx.num_outputs = len(tensors), output[-1]
        ctx.mark_non_differentiable(*output[output[-1] : -1])
        # What backward keeps has no gradient: a zero for each of it would take as much memory.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(token, *tensors, *output[:-1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """The samples in turn."""
        found = _one_after_another(Apply, info, in_dims, args)
        num_outputs = found[0][-1]
        stacked = [torch.stack(values) for values in zip(*(f[:-1] for f in found), strict=True)]
        return (*stacked, num_outputs), (*[0] * len(stacked), None)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Gradients of the wanted inputs."""
        token, *rest = ctx.saved_tensors
        inputs, rest = rest[: ctx.num_inputs], rest[ctx.num_inputs :]
        outputs, saved = rest[: ctx.num_outputs], rest[ctx.num_outputs :]
        counts = len(inputs), ctx.num_outputs
        call = (token, ctx.layer_id, ctx.spec, ctx.sizes, ctx.wanted)
        given = [
            torch.zeros_like(y) if g is None else g
            for g, y in zip(grads[: ctx.num_outputs], outputs, strict=True)
        ]
        tensors = (*given, *inputs, *outputs, *saved)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = Backward.apply(counts, *call, *tensors)  # type: ignore[no-untyped-call]
        else:
            found = _run_backward(counts, call, tensors)
        gradients = iter(found)
        wanted = [next(gradients) if ctx.wanted >> i & 1 else None for i in range(ctx.num_inputs)]
        return (None, None, None, None, None, *wanted)


class ApplyInForwardMode(Apply):
    """`Apply` where arguments may carry tangents.

    A class of its own, as torch.compile traces no function that has a `jvp`.
    """

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse: without this, tangents would be lost, and derivatives come out as zero."""
        raise NotImplementedError(
            "a relational layer has no forward-mode derivative: use torch.func.vjp, grad or jacrev"
            " instead of jvp, jacfwd or linearize"
        )


class Backward(torch.autograd.Function):
    """The generated backward where its own derivative could be asked for: it is refused."""

    @staticmethod
    def forward(
        counts: tuple[int, int],
        token: Tensor,
        layer_id: int,
        spec: str,
        sizes: list[int],
        wanted: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients of the wanted inputs."""
        return tuple(_run_backward(counts, (token, layer_id, spec, sizes, wanted), tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is saved, since nothing follows."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """The samples in turn."""
        found = zip(*_one_after_another(Backward, info, in_dims, args), strict=True)
        stacked = tuple(torch.stack(values) for values in found)
        return stacked, (0,) * len(stacked)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Refuse."""
        raise RuntimeError(
            "a relational layer is differentiable once: its generated backward has no derivative of"
            " its own. Leave create_graph out, or write the layer's formula in plain PyTorch"
        )


def _run_backward(
    counts: tuple[int, int], call: tuple[Any, ...], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Sort gradients, inputs, outputs and saved values into the operator's lists."""
    num_inputs, num_outputs = counts
    bounds = (0, num_outputs, num_outputs + num_inputs, 2 * num_outputs + num_inputs, len(tensors))
    lists = [list(tensors[a:b]) for a, b in itertools.pairwise(bounds)]
    found: list[Tensor] = torch.ops.dataeff.rgnn_backward(*lists, *call)
    return found


def _one_after_another(
    function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> list[Any]:
    """`vmap`: the samples share the graph and run in turn; there is nothing to fuse."""
    found = []
    for i in range(info.batch_size):
        one = [
            a.select(d, i) if isinstance(a, Tensor) and d is not None else a
            for a, d in zip(args, in_dims, strict=True)
        ]
        found.append(function.apply(*one))
    return found
