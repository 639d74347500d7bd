"""Linear operator reordering: multiply weights with weights first when that is less work.

`linear(linear(x, W), a)` is `linear(x, W a)`. The product of the weights costs one small product
per type; it pays when the inner product then has no reader left, or when x is narrower than the
result that was read instead (Hector, ASPLOS'24, section 3.2). Both weights stand in one type
domain, or one of them is untyped; W is always the inner one, so products keep the layer's order.
"""

from __future__ import annotations

from math import prod

from dataeff.rgnn.ir import Builder, Op, Program, rewrite


def reorder(program: Program, rows: dict[str, int]) -> Program:
    """Fold chains of linear operations; `rows` are the rows of each domain."""
    users = program.users()

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        if op.kind != "linear":
            return None
        inner, outer_weight = b[args[0]], b[args[1]]
        if inner.kind != "linear":
            return None
        inner_weight = b[inner.args[1]]
        types = {inner_weight.type.domain, outer_weight.type.domain}
        if len(types - {"one"}) > 1:
            return None
        x = b[inner.args[0]]
        equation = fold_equation(
            len(x.type.shape) - 1,
            inner_weight.type.shape,
            len(inner.type.shape) - 1,
            outer_weight.type.shape,
        )
        original = program[op.args[0]]
        alone = len(users[original.id]) == 1 and original.id not in program.outputs
        if equation is None or not _pays(op, inner, inner_weight, outer_weight, rows, alone):
            return None
        domain = (types - {"one"} or {"one"}).pop()
        weights = [_in_domain(b, w, domain) for w in (inner_weight, outer_weight)]
        folded = b.emit("einsum", *weights, attrs=(equation,), line=op.line)
        return b.emit("linear", x.id, folded, line=op.line)

    return rewrite(program, rule)


def fold_equation(
    batch: int, inner: tuple[int, ...], outer_batch: int, outer: tuple[int, ...]
) -> str | None:
    """The row equation of `W a`, or None where the axes cannot be folded.

    W has shape [*batch, in, *mid], the value between has [*batch, *mid], and a has
    [*batch, *mid, *out] with the last axis of mid contracted.
    """
    mid = len(inner) - batch - 1
    if mid == 0 or outer_batch + 1 != batch + mid:
        return None
    b, m = "bcdef"[:batch], "uvwxy"[:mid]
    o = "opqrs"[: len(outer) - outer_batch - 1]
    return f"{b}i{m},{b}{m}{o}->{b}i{m[:-1]}{o}"


def _pays(op: Op, inner: Op, w: Op, a: Op, rows: dict[str, int], alone: bool) -> bool:
    """Compare multiply-adds with and without folding."""
    num_rows, num_types = rows[op.type.domain], max(rows[w.type.domain], rows[a.type.domain])
    out = max(op.type.numel, 1)
    contracted = inner.type.shape[-1]
    batched_in = w.type.numel // max(prod(inner.type.shape), 1)
    fold = num_types * w.type.numel * out // max(prod(inner.type.shape[:-1]), 1)
    folded = num_rows * batched_in * out + fold
    kept = num_rows * contracted * out + (num_rows * w.type.numel if alone else 0)
    return folded < kept


def _in_domain(b: Builder, op: Op, domain: str) -> int:
    if op.type.domain == domain:
        return op.id
    return b.emit("gather", op.id, attrs=(f"{domain}.one",), line=op.line)
