"""Canonicalisation: local rewrites that give one form to what can be written in several.

The form that later passes look for: inner products with a typed parameter are `linear`; signs stand
outside sums; a broadcast is implicit in the elementwise operation that needs it.
"""

from __future__ import annotations

from collections.abc import Callable

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Builder, Op, Program, rewrite

_Rule = Callable[[Builder, Op, tuple[int, ...]], int | None]


def canonicalise(program: Program) -> Program:
    """Apply every local rewrite until none applies."""
    while True:
        changed = rewrite(program, _apply)
        if changed == program:
            return program
        program = changed


def _apply(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    for rule in _RULES.get(op.kind, ()):
        replaced = rule(b, op, args)
        if replaced is not None:
            return replaced
    return None


def _dot_with_parameter(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    """`sum_last(z * a[type])` is `linear(z, a)`: a weight with no output axis."""
    product = b[args[0]]
    if product.kind != "mul" or not product.type.shape or op.type.shape != product.type.shape[:-1]:
        return None
    for z, a in (product.args, product.args[::-1]):
        pick = b[a]
        if pick.kind != "gather" or domains.map_target(pick.map) not in domains.TYPE_DOMAINS:
            continue
        if b[z].type.shape == pick.type.shape == product.type.shape:
            return b.emit("linear", z, pick.args[0], line=op.line)
    return None


def _same_shape(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    return args[0] if b[args[0]].type == op.type else None


def _reshape_of_reshape(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    inner = b[args[0]]
    if inner.kind != "reshape":
        return None
    return b.emit("reshape", inner.args[0], attrs=op.attrs, line=op.line)


def _drop_expand(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    """Elementwise operands broadcast by themselves if the other one has the full shape."""
    for position, (mine, other) in enumerate((args, args[::-1])):
        expand = b[mine]
        if expand.kind == "expand" and b[other].type.shape == op.type.shape:
            operands = [other, other]
            operands[position] = expand.args[0]
            return b.emit(op.kind, *operands, line=op.line)
    return None


def _neg_outwards(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    """Move a sign out of gathers, sums, products and quotients."""
    for position, arg in enumerate(args):
        if b[arg].kind == "neg":
            operands = list(args)
            operands[position] = b[arg].args[0]
            inner = b.emit(op.kind, *operands, attrs=op.attrs, line=op.line)
            return b.emit("neg", inner, line=op.line)
    return None


def _neg_of_neg(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    return b[args[0]].args[0] if b[args[0]].kind == "neg" else None


def _add_neg(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    x, y = args
    if b[y].kind == "neg":
        return b.emit("sub", x, b[y].args[0], line=op.line)
    if b[x].kind == "neg":
        return b.emit("sub", y, b[x].args[0], line=op.line)
    return None


def _sub_neg(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    x, y = args
    return b.emit("add", x, b[y].args[0], line=op.line) if b[y].kind == "neg" else None


def _beside(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
    """Columns that stand apart and fill the row are concatenated, rather than added to zeros."""
    for first, last in (args, args[::-1]):
        left, right = b[first], b[last]
        if left.kind == right.kind == "embed" and left.attrs[0] == 0 and left.type == right.type:
            parts = left.args[0], right.args[0]
            widths = [b[p].type.shape[-1] for p in parts]
            if right.attrs[0] == widths[0] and sum(widths) == left.type.shape[-1]:
                return b.emit("concat", *parts, line=op.line)
    return None


def _constant(b: Builder, value: int) -> float | None:
    op = b[value]
    while op.kind in ("gather", "expand"):
        op = b[op.args[0]]
    return float(op.attrs[0]) if op.kind == "const" else None  # type: ignore[arg-type]


def _unit(number: float) -> _Rule:
    """Drop an operand equal to `number`; only the second for operations that do not commute."""

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        sides = (args, args[::-1]) if op.kind in ("add", "mul") else (args,)
        for keep, drop in sides:
            if _constant(b, drop) == number and b[keep].type == op.type:
                return keep
        return None

    return rule


_RULES: dict[str, tuple[_Rule, ...]] = {
    "reduce": (_same_shape, _dot_with_parameter, _neg_outwards),
    "expand": (_same_shape, _neg_outwards),
    "reshape": (_same_shape, _reshape_of_reshape),
    "gather": (_neg_outwards,),
    "sum": (_neg_outwards,),
    "linear": (_neg_outwards,),
    "linear_t": (_neg_outwards,),
    "outer": (_neg_outwards,),
    "einsum": (_neg_outwards,),
    "neg": (_neg_of_neg,),
    "add": (_drop_expand, _add_neg, _beside, _unit(0.0)),
    "sub": (_drop_expand, _sub_neg, _unit(0.0)),
    "mul": (_drop_expand, _neg_outwards, _unit(1.0)),
    "div": (_drop_expand, _neg_outwards, _unit(1.0)),
}
