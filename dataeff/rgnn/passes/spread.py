"""Take values of pairs back to the edges that read them, where storing them does not pay.

`compact` moves every value that it can, because reordering and `aggregate_first` look at products
of pairs. What is left when they are done is decided value by value here; see `pair_cost`.
"""

from __future__ import annotations

from dataeff.rgnn.ir import Builder, Op, Program, rewrite
from dataeff.rgnn.passes.pair_cost import PAIRS, pays, row_operands


def spread(program: Program, rows: dict[str, int]) -> Program:
    """Compute on the edges what does not pay on pairs; `rows` are the rows of each domain."""
    users = program.users()

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        if op.kind != "gather" or not op.map.startswith("edge."):
            return None
        home, value = op.map.partition(".")[2], program[op.args[0]]
        if home not in PAIRS or value.kind in ("gather", "input") or value.id in program.outputs:
            return None
        read_elsewhere = users[value.id] != [op.id]
        if read_elsewhere or pays(program, value, value.args, home, rows):
            return None
        return _on_edges(b, args[0])

    return rewrite(program, rule)


def _on_edges(b: Builder, value: int) -> int:
    """The same value, computed at the rows of the edges."""
    op = b[value]
    if op.kind == "gather":
        role = op.map.partition(".")[2]
        return b.emit("gather", *op.args, attrs=(f"edge.{role}",), line=op.line)
    rows = row_operands(op, op.args)
    moved = [_on_edges(b, arg) for arg in rows]
    return b.emit(op.kind, *moved, *op.args[len(rows) :], attrs=op.attrs, line=op.line)
