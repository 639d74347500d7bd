"""Backward of attention: read a sum that forward has already made instead of summing again.

`sum(alpha * <G[dst], z>)` over a destination's edges is `<G, sum(alpha * z)>`, and that sum is the
layer's own output before bias and activation (the D_i of FlashAttention's backward, arXiv
2205.14135, section B). It is rewritten only where the sum is in the program.
"""

from __future__ import annotations

from dataeff.rgnn.ir import Builder, Op, Program, rewrite


def reassociate(program: Program) -> Program:
    """Replace segment sums of weighted inner products by one inner product per segment."""

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        weighted = b[args[0]] if op.kind == "sum" else None
        if weighted is None or weighted.kind != "mul":
            return None
        for alpha, dot in (weighted.args, weighted.args[::-1]):
            inner = b[dot]
            if inner.kind != "reduce" or b[inner.args[0]].kind != "mul":
                continue
            product = b[inner.args[0]].args
            for grad, z in (product, product[::-1]):
                if b[grad].kind == "gather" and b[grad].map == op.map:
                    total = _find_sum(b, alpha, z, op)
                    if total is not None:
                        both = b.emit("mul", b[grad].args[0], total, line=op.line)
                        return b.emit("reduce", both, attrs=(op.type.shape,), line=op.line)
        return None

    return rewrite(program, rule)


def _find_sum(b: Builder, alpha: int, z: int, op: Op) -> int | None:
    """The value `sum[map](alpha * z)`, if it has been computed."""
    for earlier in b.ops:
        if earlier.kind != "sum" or earlier.attrs != op.attrs:
            continue
        message = b[earlier.args[0]]
        if message.kind == "mul" and sorted(message.args) == sorted((alpha, z)):
            return earlier.id
    return None
