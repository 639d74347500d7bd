"""The layer's operators under autograd and torch.func."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dataeff.rgnn.batched import in_turn
from dataeff.rgnn.split import NUM_TOLD


class Apply(torch.autograd.Function):
    """The layer's operator with the generated backward program behind it."""

    @staticmethod
    def forward(
        token: Tensor, layer_id: int, spec: str, sizes: list[int], wanted: int, *inputs: Tensor
    ) -> tuple[Any, ...]:
        """Outputs, what backward needs, which outputs it reads as bits, and how many there are."""
        outputs, saved = torch.ops.dataeff.rgnn_forward(
            list(inputs), token, layer_id, spec, sizes, wanted
        )
        reads = saved[-1].shape[0] if wanted else 0
        return (*outputs, *saved, reads, len(outputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save for backward."""
        token, ctx.layer_id, ctx.spec, ctx.sizes, ctx.wanted, *tensors = inputs
        *results, reads, ctx.num_outputs = output
        outputs, saved = results[: ctx.num_outputs], results[ctx.num_outputs :]
        ctx.num_inputs = len(tensors)
        ctx.reads = [k >= NUM_TOLD or bool(reads >> k & 1) for k in range(ctx.num_outputs)]
        ctx.mark_non_differentiable(*saved)
        # What backward keeps has no gradient: a zero for each of it would take as much memory.
        ctx.set_materialize_grads(False)
        # An output that is not read may be written to, as that of a layer in plain PyTorch may.
        read = [y for y, reads in zip(outputs, ctx.reads, strict=True) if reads]
        ctx.save_for_backward(token, *tensors, *read, *saved)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """The samples in turn."""
        return in_turn(cls.apply, info.batch_size, in_dims, args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Gradients of the wanted inputs."""
        token, *rest = ctx.saved_tensors
        inputs, rest = rest[: ctx.num_inputs], rest[ctx.num_inputs :]
        num_read = sum(ctx.reads)
        read, saved = iter(rest[:num_read]), rest[num_read:]
        outputs = [next(read) if reads else None for reads in ctx.reads]
        counts = len(inputs), ctx.num_outputs
        call = (token, ctx.layer_id, ctx.spec, ctx.sizes, ctx.wanted)
        tensors = (*grads[: ctx.num_outputs], *inputs, *outputs, *saved)
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
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Gradients of the wanted inputs."""
        return tuple(_run_backward(counts, (token, layer_id, spec, sizes, wanted), tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is saved, since nothing follows."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """The samples in turn."""
        return in_turn(Backward.apply, info.batch_size, in_dims, args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Refuse."""
        raise RuntimeError(
            "a relational layer is differentiable once: its generated backward has no derivative of"
            " its own. Leave create_graph out, or write the layer's formula in plain PyTorch"
        )


def _run_backward(
    counts: tuple[int, int], call: tuple[Any, ...], tensors: Sequence[Tensor | None]
) -> list[Tensor]:
    """Sort gradients, inputs, outputs and saved values into the operator's lists."""
    num_inputs, num_outputs = counts
    bounds = (0, num_outputs, num_outputs + num_inputs, 2 * num_outputs + num_inputs, len(tensors))
    lists = [list(tensors[a:b]) for a, b in itertools.pairwise(bounds)]
    found: list[Tensor] = torch.ops.dataeff.rgnn_backward(*lists, *call)
    return found
