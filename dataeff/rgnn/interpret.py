"""The executable meaning of the inter-operator IR: an interpreter in plain PyTorch.

Every backend is compared with this one. It is also the fallback when there is no compiler, and it
is differentiable, so autograd through it checks the generated backward programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Op, Program, Type
from dataeff.rgnn.view import View


def interpret(program: Program, view: View, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Run a program.

    Args:
        program: what to run.
        view: supplies every row map.
        inputs: a tensor [rows, *row shape] for each `input` (without rows in the domain `one`).

    Returns:
        The program's outputs, [rows, *row shape] each.
    """
    values: list[Tensor] = []
    like = next(iter(inputs.values()))
    for op in program.ops:
        types = [program[a].type for a in op.args]
        values.append(run_op(op, [values[a] for a in op.args], types, view, inputs, like))
    return [_strip(program[o], values[o]) for o in program.outputs]


def _strip(op: Op, value: Tensor) -> Tensor:
    return value[0] if op.type.domain == "one" else value


def run_op(
    op: Op,
    args: list[Tensor],
    types: list[Type],
    view: View,
    inputs: dict[str, Tensor],
    like: Tensor,
) -> Tensor:
    """Run one operation on tensors with a row axis (of size 1 in the domain `one`)."""
    if op.kind == "input":
        value = inputs[str(op.attrs[0])]
        return value.unsqueeze(0) if op.type.domain == "one" else value
    if op.kind == "const":
        return like.new_full((1,), float(op.attrs[0]))  # type: ignore[arg-type]
    if op.kind == "degree":
        s = view.segments(op.map)
        return (s.end - s.begin).to(like.dtype)
    if op.kind in _ELEMENTWISE:
        return _ELEMENTWISE[op.kind](*_align(args), *op.attrs)
    return _STRUCTURAL[op.kind](op, args, types, view)


def _align(args: Sequence[Tensor]) -> list[Tensor]:
    """Give every operand the same number of axes, adding axes of size 1 on the right."""
    rank = max(a.dim() for a in args)
    return [a.reshape(a.shape + (1,) * (rank - a.dim())) for a in args]


def _slope(x: Tensor, slope: Any) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


def _gelu_grad(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) * 0.3989422804014327
    return 0.5 * (1 + torch.erf(x * 0.7071067811865476)) + x * density


_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "slope": _slope,
    "gelu": F.gelu,
    "gelu_grad": _gelu_grad,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "equal": lambda a, b: (a == b).to(a.dtype),
}


def _gather(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    if op.map.endswith(".one"):
        rows = view.num_rows(domains.map_source(op.map))
        return args[0].expand(rows, *args[0].shape[1:])
    return args[0].index_select(0, view.index(op.map))


def _sum(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    (x,) = args
    if op.map.endswith(".one"):
        return x.sum(0, keepdim=True)
    out = x.new_zeros(view.num_rows(domains.map_target(op.map)), *x.shape[1:])
    return out.index_add(0, view.index(op.map), x)


def _amax(x: Tensor, name: str, view: View, empty: float) -> Tensor:
    rows = view.num_rows(domains.map_target(name))
    out = x.new_full((rows, *x.shape[1:]), empty)
    index = view.index(name).long()
    index = index.reshape((-1,) + (1,) * (x.dim() - 1)).expand_as(x)
    return out.scatter_reduce(0, index, x, "amax", include_self=False)


def _max(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    return _amax(args[0], op.map, view, 0.0)


def _top(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    return _amax(args[0].detach(), op.map, view, 0.0)


def _logsum(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    (x,) = args
    top = _top(op, args, types, view)
    index = view.index(op.map)
    total = torch.zeros_like(top).index_add(0, index, torch.exp(x - top.index_select(0, index)))
    return torch.log(torch.where(total == 0, float("inf"), total))


def _prefix(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    return args[0][: view.num_rows("dst")]


def _pad(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    missing = view.num_rows("node") - view.num_rows("dst")
    if missing == 0:
        return args[0]
    return torch.cat([args[0], args[0].new_zeros(missing, *args[0].shape[1:])])


def _letters(batch: int, out: int) -> tuple[str, str, str]:
    """Axis letters of a product's batch axes, of its input axis, and of its output axes."""
    return "bcdef"[:batch], "i", "opqrs"[:out]


def _rows_of_types(source: str, target: str, rows: int, view: View) -> list[Tensor]:
    """The rows of each type; rows of a type domain are their own types."""
    if target == "one":
        return [torch.arange(rows, device=view.device)]
    if source == target:
        return list(torch.arange(rows, device=view.device).split(1))
    types = view.index(f"{source}.{target}")
    return [(types == t).nonzero().squeeze(1) for t in range(view.num_rows(target))]


def _typed_product(equation: str, x: Tensor, w: Tensor, op: Op, target: str, view: View) -> Tensor:
    parts = _rows_of_types(op.type.domain, target, x.shape[0], view)
    products = [torch.einsum(equation, x[rows], w[t]) for t, rows in enumerate(parts)]
    order = torch.cat(parts)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return torch.cat(products).index_select(0, back)


def _linear(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    x, w = args
    b, i, o = _letters(x.dim() - 2, w.dim() - x.dim())
    return _typed_product(f"n{b}{i},{b}{i}{o}->n{b}{o}", x, w, op, types[1].domain, view)


def _linear_t(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    y, w = args
    batch = int(op.attrs[0])  # type: ignore[arg-type]
    b, i, o = _letters(batch, w.dim() - batch - 2)
    return _typed_product(f"n{b}{o},{b}{i}{o}->n{b}{i}", y, w, op, types[1].domain, view)


def _outer(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    x, y = args
    b, i, o = _letters(x.dim() - 2, y.dim() - x.dim() + 1)
    parts = _rows_of_types(types[0].domain, op.type.domain, x.shape[0], view)
    equation = f"n{b}{i},n{b}{o}->{b}{i}{o}"
    return torch.stack([torch.einsum(equation, x[rows], y[rows]) for rows in parts])


def _einsum(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    inputs, out = str(op.attrs[0]).split("->")
    left, right = inputs.split(",")
    return torch.einsum(f"n{left},n{right}->n{out}", *args)


def _reduce(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    (x,) = args
    shape = op.type.shape + (1,) * (x.dim() - 1 - len(op.type.shape))
    axes = [a + 1 for a, n in enumerate(shape) if n == 1 and x.shape[a + 1] != 1]
    return (x.sum(axes) if axes else x).reshape(x.shape[0], *op.type.shape)


def _expand(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    (x,) = args
    x = x.reshape(x.shape + (1,) * (len(op.type.shape) + 1 - x.dim()))
    return x.expand(x.shape[0], *op.type.shape)


def _reshape(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    return args[0].reshape(args[0].shape[0], *op.type.shape)


def _concat(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    return torch.cat(args, dim=-1)


def _slice(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    return args[0][..., op.attrs[0] : op.attrs[1]]


def _embed(op: Op, args: list[Tensor], types: list[Type], view: View) -> Tensor:
    start, total = int(op.attrs[0]), int(op.attrs[1])  # type: ignore[arg-type]
    return F.pad(args[0], (start, total - start - args[0].shape[-1]))


_STRUCTURAL: dict[str, Callable[[Op, list[Tensor], list[Type], View], Tensor]] = {
    "gather": _gather,
    "sum": _sum,
    "max": _max,
    "top": _top,
    "logsum": _logsum,
    "prefix": _prefix,
    "pad": _pad,
    "linear": _linear,
    "linear_t": _linear_t,
    "outer": _outer,
    "einsum": _einsum,
    "reduce": _reduce,
    "expand": _expand,
    "reshape": _reshape,
    "concat": _concat,
    "slice": _slice,
    "embed": _embed,
}
