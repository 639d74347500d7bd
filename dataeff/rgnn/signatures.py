"""Operand rules of every operation of the inter-operator IR: one function per family.

Shapes broadcast *from the left*: a per-head scale `[H]` meets `[H, D]` as `[H, 1]`. Domains never
broadcast; a value changes domain only through `gather`, `prefix`, `pad` or a reduction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Attr, IRTypeError, Type

Rule = Callable[[list[Type], tuple[Attr, ...]], Type]

UNARY = (
    "neg",
    "exp",
    "log",
    "sqrt",
    "tanh",
    "sigmoid",
    "relu",
    "leaky_relu",
    "slope",
    "gelu",
    "gelu_grad",
)
BINARY = ("add", "sub", "mul", "div", "maximum", "equal")
# `top` is the maximum as a constant, `logsum` the logarithm of the sum of exp(x - top): together
# the logsumexp, in two numbers so that large ones lose nothing. A segment without rows has the top
# 0 and the logsum inf, so that its weights, exp(x - top - logsum), are 0.
SEGMENT = ("sum", "max", "top", "logsum")
# Their result can share the memory of their operand.
ALIASES = ("prefix", "pad")
# Their derivative is zero almost everywhere, or is taken as zero.
NO_DERIVATIVE = ("equal", "slope", "degree", "top")


def broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Left-aligned broadcast of two row shapes."""
    longest = max(len(a), len(b))
    pa, pb = a + (1,) * (longest - len(a)), b + (1,) * (longest - len(b))
    if any(x != y and 1 not in (x, y) for x, y in zip(pa, pb, strict=True)):
        typed = (
            "" if len(a) == len(b) else "; a parameter with a row per type is picked by p[g.etype]"
        )
        raise IRTypeError(
            f"row shapes {list(a)} and {list(b)} do not broadcast (axes are matched from the left"
            f"{typed})"
        )
    return tuple(max(x, y) if 0 not in (x, y) else 0 for x, y in zip(pa, pb, strict=True))


def _unary(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    return types[0]


def _binary(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    a, b = types
    if a.domain != b.domain:
        raise IRTypeError(f"operands stand in different domains: {a} and {b}")
    try:
        return Type(a.domain, broadcast(a.shape, b.shape))
    except IRTypeError as error:
        raise IRTypeError(f"{a} and {b}: {error}") from None


def _check_map(types: list[Type], attrs: tuple[Attr, ...], side: int) -> str:
    name = str(attrs[0])
    if name not in domains.MAPS:
        raise IRTypeError(f"no row map is called {name!r}")
    expected = domains.MAPS[name][side]
    if types and types[0].domain != expected:
        raise IRTypeError(f"{name} needs a {expected} value, got {types[0]}")
    return name


def _gather(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    return Type(domains.map_source(_check_map(types, attrs, 1)), types[0].shape)


def _segment(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    return Type(domains.map_target(_check_map(types, attrs, 0)), types[0].shape)


def _degree(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    return Type(domains.map_target(_check_map(types, attrs, 0)))


def _prefix(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    if types[0].domain != "node":
        raise IRTypeError(f"prefix needs a node value, got {types[0]}")
    return Type("dst", types[0].shape)


def _pad(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    if types[0].domain != "dst":
        raise IRTypeError(f"pad needs a dst value, got {types[0]}")
    return Type("node", types[0].shape)


def _typed(x: Type, w: Type) -> None:
    if w.domain not in domains.TYPE_DOMAINS or (
        x.domain != w.domain and domains.path(x.domain, w.domain) is None
    ):
        nodes = x.domain == "edge" and w.domain == "ntype"
        remedy = "; multiply the nodes, before g.src or g.dst brings them there"
        raise IRTypeError(
            f"rows of {x} have no {domains.DOMAINS[w.domain]} to pick a weight {w} by"
            + (remedy if nodes else "")
        )


def _linear(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    x, w = types
    _typed(x, w)
    if not x.shape or x.shape != w.shape[: len(x.shape)]:
        leading = len(x.shape) == 1 and len(w.shape) == 3 and x.shape == w.shape[1:2]
        remedy = "; for heads of one input, join them in the weight, and reshape the result"
        if w.domain == "one":
            remedy += "; one weight per relation is picked by W[g.etype]"
        if w.domain != "one" and len(w.shape) <= len(x.shape):
            leading, remedy = True, "; before them it has an axis of types, one entry for each"
        raise IRTypeError(
            f"input {x} and weight {w}: the weight's leading axes must be the input's row shape"
            + (remedy if leading else "")
        )
    return Type(x.domain, x.shape[:-1] + w.shape[len(x.shape) :])


def _linear_t(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    y, w = types
    _typed(y, w)
    batch = int(attrs[0])  # type: ignore[arg-type]
    if y.shape != w.shape[:batch] + w.shape[batch + 1 :]:
        raise IRTypeError(f"transposed product of {y} with {w} over axis {batch} does not fit")
    return Type(y.domain, w.shape[: batch + 1])


def _outer(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    x, y = types
    target = str(attrs[0])
    batch = len(x.shape) - 1
    if x.domain != y.domain or not x.shape or x.shape[:-1] != y.shape[:batch]:
        raise IRTypeError(f"outer product of {x} and {y} does not fit")
    _typed(x, Type(target))
    return Type(target, x.shape + y.shape[batch:])


def _einsum(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    a, b = types
    equation = str(attrs[0])
    if not re.fullmatch(r"[a-z]*,[a-z]*->[a-z]*", equation):
        raise IRTypeError(f"{equation!r} is no equation of two operands")
    left, right = equation.split("->")[0].split(",")
    if not set(equation.split("->")[1]) <= {*left, *right}:
        raise IRTypeError(f"einsum {equation}: an axis of the result is in neither operand")
    if a.domain != b.domain or len(left) != len(a.shape) or len(right) != len(b.shape):
        raise IRTypeError(f"einsum {equation} does not fit {a} and {b}")
    sizes: dict[str, int] = {}
    for letter, size in zip(left + right, a.shape + b.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise IRTypeError(f"einsum {equation} of {a} and {b}: axis {letter} has two sizes")
    return Type(a.domain, tuple(sizes[c] for c in equation.split("->")[1]))


def _shape(attrs: tuple[Attr, ...]) -> tuple[int, ...]:
    shape = attrs[0]
    if not isinstance(shape, tuple) or any(not isinstance(n, int) or n < 0 for n in shape):
        raise IRTypeError(f"{shape!r} is no row shape")
    return shape


def _columns(attrs: tuple[Attr, ...]) -> tuple[int, int]:
    first, second = attrs
    if not isinstance(first, int) or not isinstance(second, int):
        raise IRTypeError(f"{first!r} and {second!r} are no columns")
    return first, second


def _reduce(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    shape = _shape(attrs)
    if broadcast(types[0].shape, shape) != types[0].shape:
        raise IRTypeError(f"cannot sum {types[0]} to row shape {list(shape)}")
    return Type(types[0].domain, shape)


def _expand(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    shape = _shape(attrs)
    if broadcast(types[0].shape, shape) != shape:
        raise IRTypeError(f"cannot expand {types[0]} to row shape {list(shape)}")
    return Type(types[0].domain, shape)


def _reshape(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    shape = _shape(attrs)
    if prod(shape) != types[0].numel:
        raise IRTypeError(f"cannot reshape {types[0]} to row shape {list(shape)}")
    return Type(types[0].domain, shape)


def _concat(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    if len({(t.domain, t.shape[:-1]) for t in types}) != 1 or not types[0].shape:
        raise IRTypeError(f"cannot concatenate {' and '.join(map(str, types))} on their last axis")
    return Type(types[0].domain, (*types[0].shape[:-1], sum(t.shape[-1] for t in types)))


def _slice(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    start, stop = _columns(attrs)
    if not types[0].shape or not 0 <= start <= stop <= types[0].shape[-1]:
        raise IRTypeError(f"cannot take columns {start}:{stop} of {types[0]}")
    return Type(types[0].domain, (*types[0].shape[:-1], stop - start))


def _embed(types: list[Type], attrs: tuple[Attr, ...]) -> Type:
    start, total = _columns(attrs)
    if not types[0].shape or start < 0 or start + types[0].shape[-1] > total:
        raise IRTypeError(f"cannot place {types[0]} at column {start} of {total}")
    return Type(types[0].domain, (*types[0].shape[:-1], total))


# kind -> (operands or None for any number, attributes, rule)
SIGNATURES: dict[str, tuple[int | None, int, Rule]] = {
    **{k: (1, 1 if k in ("leaky_relu", "slope") else 0, _unary) for k in UNARY},
    **{k: (2, 0, _binary) for k in BINARY},
    **{k: (1, 1, _segment) for k in SEGMENT},
    "gather": (1, 1, _gather),
    "degree": (0, 1, _degree),
    "prefix": (1, 0, _prefix),
    "pad": (1, 0, _pad),
    "linear": (2, 0, _linear),
    "linear_t": (2, 1, _linear_t),
    "outer": (2, 1, _outer),
    "einsum": (2, 1, _einsum),
    "reduce": (1, 1, _reduce),
    "expand": (1, 1, _expand),
    "reshape": (1, 1, _reshape),
    "concat": (None, 0, _concat),
    "slice": (1, 2, _slice),
    "embed": (1, 2, _embed),
}


def infer(kind: str, types: list[Type], attrs: tuple[Attr, ...], given: Type | None) -> Type:
    """The result type of `kind` applied to operands of these types.

    Raises:
        IRTypeError: unknown operation, wrong number of operands or attributes, or types that do
            not fit.
    """
    if kind in ("input", "const"):
        if given is None or types or len(attrs) != 1:
            raise IRTypeError(f"{kind} needs a type, one attribute and no operand")
        if given.domain not in domains.DOMAINS:
            raise IRTypeError(f"{given} is of no domain; there are {', '.join(domains.DOMAINS)}")
        if not isinstance(attrs[0], str if kind == "input" else float):
            raise IRTypeError(f"{attrs[0]!r} is no {'name' if kind == 'input' else 'number'}")
        return given
    if kind not in SIGNATURES:
        raise IRTypeError(f"unknown operation {kind!r}")
    arity, num_attrs, rule = SIGNATURES[kind]
    if (
        (arity is not None and len(types) != arity)
        or len(attrs) != num_attrs
        or (arity is None and not types)
    ):
        raise IRTypeError(f"{kind} takes {arity} operands and {num_attrs} attributes")
    return rule(types, attrs)
