"""Triton expressions for values of one row, out of variables that hold their operands."""

from __future__ import annotations

from dataeff.rgnn.ir import Op
from dataeff.rgnn.signatures import BINARY, UNARY
from dataeff.rgnn.triton.text import (
    Shape,
    extend,
    insert,
    padded,
    sum_axes,
    trivial_reshape,
)

_FORMULA = {
    "neg": "-{0}",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})",
    "tanh": "tanh({0})",
    "sigmoid": "1 / (1 + tl.exp(-{0}))",
    "relu": "tl.where({0} < 0, 0, {0})",
    "leaky_relu": "tl.where({0} > 0, {0}, {0} * {a})",
    "slope": "tl.where({0} > 0, 1.0, {a})",
    "gelu": "gelu({0})",
    "gelu_grad": "gelu_grad({0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "maximum": "maximum({0}, {1})",
    "equal": "tl.where({0} == {1}, 1.0, 0.0)",
}


def elementwise(op: Op, names: list[str], shapes: list[Shape], dtype: str) -> str:
    """A formula of elements, or elements that change place; `dtype` is that of sums."""
    rank = len(op.type.shape)
    if op.kind == "reduce":
        return _reduce(op, names[0], shapes[0])
    if op.kind == "reshape":
        return trivial_reshape(names[0], shapes[0], op.type.shape)
    if op.kind == "expand":
        lanes = ", ".join(["1", *map(str, padded(op.type.shape))])
        return f"{extend(names[0], len(shapes[0]), rank)} + tl.zeros([{lanes}], {dtype})"
    assert op.kind in UNARY or op.kind in BINARY, op.kind
    parts = [extend(n, len(s), rank) for n, s in zip(names, shapes, strict=True)]
    # A bare number would be a float32 scalar, also beside float64 tensors.
    number = float(op.attrs[0]) if op.attrs else 0.0  # type: ignore[arg-type]
    constant = f"tl.full([1{', 1' * rank}], {number!r}, {dtype})"
    return _FORMULA[op.kind].format(*parts, a=constant)


def _reduce(op: Op, name: str, full: Shape) -> str:
    shape = op.type.shape + (1,) * (len(full) - len(op.type.shape))
    axes = [a for a, n in enumerate(shape) if n == 1 and full[a] != 1]
    text = sum_axes(name, full, axes)
    # axes that are summed vanish; those of size 1 that the result keeps come back
    left = [n for a, n in enumerate(full) if a not in axes]
    return trivial_reshape(text, tuple(left), op.type.shape)


def product(op: Op, left: str, have: Shape, weight: str, shape: Shape) -> str:
    """A row, of the shape `have`, times a narrow weight of that shape, transposed or not."""
    if op.kind == "linear":
        axis = len(have) - 1
        return sum_axes(f"({extend(left, len(have), len(shape))} * {weight})", shape, [axis])
    batch = int(op.attrs[0])  # type: ignore[arg-type]
    grown = insert(left, batch, len(shape) - batch - 1)
    return sum_axes(f"({grown} * {weight})", shape, list(range(batch + 1, len(shape))))
