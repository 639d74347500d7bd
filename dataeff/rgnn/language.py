"""The layer language: the functions that a layer is written in, beside arithmetic.

Inside a function decorated with `rgnn.layer`, tensors are symbols (`symbols`), the graph is another
(`graph_symbol`), and every operation appends to the inter-operator IR. Mixing domains or shapes
that do not fit raises `LayerTypeError` with the line of the layer's source and both types.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, prod
from typing import Any

from dataeff.rgnn.symbols import (
    Argument,
    Picked,
    Symbol,
    Value,
    align,
    as_rows,
    described,
    emit,
    expect,
    tracer_of,
    unary,
)
from dataeff.rgnn.tracer import Tracer


def linear(x: Symbol, weight: Symbol) -> Value:
    """Row times matrix: `y[..., o] = sum_i x[..., i] W[..., i, o]`.

    Args:
        x: rows [*batch, in].
        weight: a parameter [*batch, in, *out], or a typed one, `W[g.etype]` or `W[g.ntype]`.

    Returns:
        Rows [*batch, *out]. Leading axes that x has before `in` are shared with the weight, so a
        weight [heads, d, d] is applied head by head to x of [heads, d].
    """
    tracer = tracer_of(x, weight)
    left = as_rows(tracer, x)
    right = weight.id if isinstance(weight, Picked | Value) else _parameter(tracer, weight)
    return emit(tracer, "linear", left.id, right)


def dot(a: Symbol, b: Symbol) -> Value:
    """Inner product over the last axis of two values of one shape."""
    tracer = tracer_of(a, b)
    left, right = align(tracer, [a, b])
    product = emit(tracer, "mul", left.id, right.id)
    if not product.type.shape:
        raise tracer.error(f"dot needs an axis to sum over, got {left.type} and {right.type}")
    return emit(tracer, "reduce", product.id, attrs=(product.type.shape[:-1],))


def outer(a: Symbol, b: Symbol) -> Value:
    """Outer product of rows: `y[i, j] = a[i] b[j]`, for values of one row domain."""
    tracer = tracer_of(a, b)
    left, right = align(tracer, [a, b])
    if len(left.type.shape) != 1 or len(right.type.shape) != 1:
        raise tracer.error(f"outer needs rows with one axis, got {left.type} and {right.type}")
    return reshape(left, left.type.numel, 1) * reshape(right, 1, right.type.numel)


def concat(*values: Symbol) -> Value:
    """Join values along their last axis."""
    tracer = tracer_of(*values)
    aligned = align(tracer, values)
    if scalars := [v for v in aligned if not v.type.shape]:
        raise tracer.error(f"concat needs values with an axis to join, got {scalars[0].type}")
    return emit(tracer, "concat", *(v.id for v in aligned))


def split(value: Symbol, sizes: Sequence[int]) -> tuple[Value, ...]:
    """Cut a value into parts of these sizes along its last axis."""
    tracer = tracer_of(value)
    whole = as_rows(tracer, value)
    if isinstance(sizes, int):
        raise tracer.error(f"split needs the size of each part, as in [2, 3], not {sizes}")
    if not whole.type.shape or sum(sizes) != whole.type.shape[-1]:
        raise tracer.error(f"sizes {list(sizes)} do not add up to the last axis of {whole.type}")
    parts, start = [], 0
    for size in sizes:
        parts.append(emit(tracer, "slice", whole.id, attrs=(start, start + size)))
        start += size
    return tuple(parts)


def reshape(value: Symbol, *shape: int) -> Value:
    """Give each row another shape, for example `reshape(q, heads, -1)`."""
    tracer = tracer_of(value)
    rows = as_rows(tracer, value)
    if not all(isinstance(size, int) for size in shape) or shape.count(-1) > 1:
        raise tracer.error(
            f"reshape of {rows.type} needs whole numbers, one of which may be -1, got {shape}"
        )
    rest = prod(size for size in shape if size != -1)
    shape = tuple(rows.type.numel // max(rest, 1) if s == -1 else s for s in shape)
    return emit(tracer, "reshape", rows.id, attrs=(shape,))


def exp(x: Symbol) -> Value:
    """Exponential."""
    return unary("exp", x)


def log(x: Symbol) -> Value:
    """Natural logarithm."""
    return unary("log", x)


def sqrt(x: Symbol) -> Value:
    """Square root."""
    return unary("sqrt", x)


def tanh(x: Symbol) -> Value:
    """Hyperbolic tangent."""
    return unary("tanh", x)


def sigmoid(x: Symbol) -> Value:
    """Logistic function."""
    return unary("sigmoid", x)


def relu(x: Symbol) -> Value:
    """max(x, 0)."""
    return unary("relu", x)


def gelu(x: Symbol) -> Value:
    """The Gaussian error linear unit, x Phi(x)."""
    return unary("gelu", x)


def leaky_relu(x: Symbol, negative_slope: float = 0.01) -> Value:
    """X where positive, else x times the slope."""
    if not isinstance(negative_slope, int | float) or not isfinite(negative_slope):
        raise tracer_of(x).error(f"negative_slope is a finite number, got {negative_slope!r}")
    return unary("leaky_relu", x, (float(negative_slope),))


def positive(x: Symbol) -> Value:
    """1 where positive, else 0; its derivative is taken as zero."""
    return unary("slope", x, (0.0,))


def edge_softmax(score: Symbol, *, per_relation: bool = False) -> Value:
    """Softmax of an edge value over the edges of each destination (and relation).

    `exp(score - top - logsum)`, where top is a segment's largest score and logsum the logarithm of
    its sum of `exp(score - top)`: both come from one pass over the edges (Milakov and Gimelshein,
    arXiv 1805.02867) and are what backward keeps. Scores of any size are safe, and lose nothing.
    """
    tracer = tracer_of(score)
    edges = expect(tracer, score, ("edge",), "edge_softmax")
    name = "edge.dst_pair" if per_relation else "edge.dst"
    shifted = edges
    for part in ("top", "logsum"):
        of_segment = emit(tracer, part, edges.id, attrs=(name,))
        back = emit(tracer, "gather", of_segment.id, attrs=(name,))
        shifted = emit(tracer, "sub", shifted.id, back.id)
    return unary("exp", shifted)


def _parameter(tracer: Tracer, symbol: Any) -> int:
    if not isinstance(symbol, Argument):
        raise tracer.error(f"expected a parameter, got {described(symbol)}")
    return symbol.at("one")
