"""Destination-side compaction: add rows up first, multiply the sums.

`sum over edges of linear(x, W)` is `linear(sum of x, W)` per (destination, relation) pair. It
trades products per (source, relation) pair for products per destination pair, so it is chosen by
the graph's own counts; per-relation means stand on destination pairs already.

The opposite rewrite is here too: a sum over pairs of scaled sums over edges is one sum over edges
of scaled values, which is what a source-compact layer wants.
"""

from __future__ import annotations

from dataeff.rgnn.ir import Builder, Op, Program, rewrite


def aggregate_first(program: Program, rows: dict[str, int]) -> Program:
    """Choose for each summed linear message the side it is multiplied on."""
    users = program.users()

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        if op.kind != "sum" or op.map not in ("edge.dst", "edge.dst_pair", "dst_pair.dst"):
            return None
        if op.map == "dst_pair.dst":
            return _flatten(b, op, args[0])
        message = program[op.args[0]]
        if message.kind != "gather" or message.map != "edge.src_pair":
            return None
        product = program[message.args[0]]
        once = all(len(users[v.id]) == 1 for v in (message, product))
        if product.kind != "linear" or not once or product.id in program.outputs:
            return None
        if not _pays(op, program[product.args[0]], product, rows):
            return None
        return _sum_then_multiply(b, op, args[0])

    return rewrite(program, rule)


def _pays(op: Op, x: Op, product: Op, rows: dict[str, int]) -> bool:
    """Compare element counts: products weigh their depth, everything else its bytes."""
    edges, src_pairs, dst_pairs = rows["edge"], rows["src_pair"], rows["dst_pair"]
    width_in, width_out = x.type.numel, product.type.numel
    depth = x.type.shape[-1] / 16  # a multiply-add costs about a sixteenth of a moved element
    at_src = src_pairs * (width_in + width_out * (1 + depth)) + edges * width_out
    at_dst = edges * width_in + dst_pairs * (width_in + width_out * (1 + depth))
    if op.map == "edge.dst":
        at_dst += dst_pairs * width_out
    return at_dst < 0.9 * at_src


def _sum_then_multiply(b: Builder, op: Op, message: int) -> int | None:
    product = b[b[message].args[0]]
    x, weight = b[product.args[0]], product.args[1]
    if x.kind != "gather" or x.map != "src_pair.src":
        return None
    rows = b.emit("gather", x.args[0], attrs=("edge.src",), line=op.line)
    total = b.emit("sum", rows, attrs=("edge.dst_pair",), line=op.line)
    made = b.emit("linear", total, weight, line=op.line)
    if op.map == "edge.dst_pair":
        return made
    return b.emit("sum", made, attrs=("dst_pair.dst",), line=op.line)


def _flatten(b: Builder, op: Op, value: int) -> int | None:
    """Sum over pairs of (sum over edges of v) / d  ->  sum over edges of v / d[pair]."""
    scaled = b[value]
    if scaled.kind not in ("div", "mul"):
        return None
    inner = b[scaled.args[0]]
    scale = b[scaled.args[1]]
    if inner.kind != "sum" or inner.map != "edge.dst_pair" or scale.type.shape:
        return None
    factor = b.emit("gather", scale.id, attrs=("edge.dst_pair",), line=op.line)
    message = b.emit(scaled.kind, inner.args[0], factor, line=op.line)
    return b.emit("sum", message, attrs=("edge.dst",), line=op.line)
