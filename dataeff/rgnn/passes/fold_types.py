"""Reordering across types: a node's projection and its relation's become one weight per relation.

In a graph of typed nodes all sources of a relation have one type, so `(x K[ntype] + b[ntype])
W[etype]` is `x K'[etype] + b'[etype]` with `K'[r] = K[source type of r] W[r]` and `b'` likewise:
the order of the factors and the type of the *source* are what HGT needs (Hector, ASPLOS'24, section
3.2). It pays where relations are few against nodes and heads do not widen the product.
"""

from __future__ import annotations

from dataclasses import dataclass

from dataeff.rgnn.ir import Builder, Op, Program, rewrite
from dataeff.rgnn.passes.reorder import fold_equation

_ENDS = {"src": "etype.src_ntype", "dst": "etype.dst_ntype"}


@dataclass(frozen=True)
class _Projection:
    """`x K[ntype] + b[ntype]`; the bias is optional."""

    x: Op
    weight: Op
    bias: Op | None


def fold_types(program: Program, rows: dict[str, int]) -> Program:
    """Fold projections by node type into those by relation; `rows` are the rows of each domain.

    Only for graphs whose relations have one node type at either end.
    """
    users = program.users()

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        if op.kind != "linear" or b[args[1]].type.domain != "etype":
            return None
        gather, weight = b[args[0]], b[args[1]]
        end = _ENDS.get(gather.map.partition(".")[2]) if gather.kind == "gather" else None
        inner = _projection(b, b[gather.args[0]]) if end is not None else None
        if inner is None or end is None:
            return None
        equation = fold_equation(
            len(inner.x.type.shape) - 1,
            inner.weight.type.shape,
            len(gather.type.shape) - 1,
            weight.type.shape,
        )
        original = program[program[op.args[0]].args[0]]
        alone = users[original.id] == [op.args[0]] and users[op.args[0]] == [op.id]
        alone = alone and not {original.id, op.args[0]} & set(program.outputs)
        if equation is None or not _pays(op, inner, weight, rows, alone):
            return None
        return _fold(b, op, gather, inner, weight, equation, end)

    return rewrite(program, rule)


def _projection(b: Builder, value: Op) -> _Projection | None:
    """Read a value of the nodes as a typed projection, if it is one."""
    if value.kind == "linear" and b[value.args[1]].type.domain == "ntype":
        return _Projection(b[value.args[0]], b[value.args[1]], None)
    if value.kind != "add":
        return None
    for product, offset in (value.args, value.args[::-1]):
        inner, bias = _projection(b, b[product]), b[offset]
        typed = bias.kind == "gather" and bias.map.endswith(".ntype")
        if inner and inner.bias is None and typed and bias.type == b[product].type:
            return _Projection(inner.x, inner.weight, b[bias.args[0]])
    return None


def _pays(op: Op, inner: _Projection, weight: Op, rows: dict[str, int], alone: bool) -> bool:
    """Compare multiply-adds with and without folding."""
    width_in = inner.x.type.shape[-1]
    folded_size = width_in * op.type.numel
    fold = rows["etype"] * width_in * weight.type.numel
    kept = rows[op.type.domain] * weight.type.numel
    if alone:
        kept += rows[inner.x.type.domain] * inner.weight.type.numel
    return rows[op.type.domain] * folded_size + fold < kept


def _fold(
    b: Builder, op: Op, gather: Op, inner: _Projection, weight: Op, equation: str, end: str
) -> int:
    def typed(value: Op) -> int:
        return b.emit("gather", value.id, attrs=(end,), line=op.line)

    both = b.emit("einsum", typed(inner.weight), weight.id, attrs=(equation,), line=op.line)
    rows = b.emit("gather", inner.x.id, attrs=gather.attrs, line=op.line)
    product = b.emit("linear", rows, both, line=op.line)
    if inner.bias is None:
        return product
    offset = b.emit(
        "einsum", typed(inner.bias), weight.id, attrs=(equation.replace("i", ""),), line=op.line
    )
    offset = b.emit("gather", offset, attrs=(f"{op.type.domain}.etype",), line=op.line)
    return b.emit("add", product, offset, line=op.line)
