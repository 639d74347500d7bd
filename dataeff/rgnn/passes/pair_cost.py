"""Whether a value of the edges is worth storing once per pair, from the rows of the graph.

With E edges and U pairs, a value of `width` elements computed from `read` elements by arithmetic
worth `work` of them costs, forward and backward, in moved elements

    on pairs:  2 U (read + work + width) + E (1 + width)
    on edges:  2 E (read + work)

On pairs it is stored and its gradient summed, and each edge reads a pair's number and its row; on
edges it is computed in the kernel that reads it. So what decides is the graph's own compaction
ratio U / E (Hector, ASPLOS'24, section 3.3): the score `a[r] . x[src]` of 64 features is worth its
pairs below a ratio of 0.98, one of 4 features below 0.78.

Two kinds of values are worth it at any ratio. Products carried out as matrix products: their rows
have to be sorted by relation, as pairs are and edges are not. And what is as cheap to compute as to
read, which is never stored: summed to pairs first, its gradient is less work.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dataeff.rgnn.domains import TYPE_DOMAINS, map_target
from dataeff.rgnn.ir import Builder, Op, Program
from dataeff.rgnn.lower import COSTLY, category
from dataeff.rgnn.signatures import BINARY, UNARY

Ops = Builder | Program

MOVABLE = (
    *UNARY,
    *BINARY,
    *("linear", "linear_t", "einsum", "reduce", "expand", "reshape", "concat", "slice", "embed"),
)
PAIRS = ("src_pair", "dst_pair")
MULTIPLY_ADD = 1  # moved element: a product in a traversal reads each weight for each row
FUNCTION = 32  # moved elements that an exponential, a root or a sigmoid takes as long as


@dataclass
class _Count:
    """Elements of operands read, and arithmetic in moved elements, for one row."""

    read: int = 0
    work: float = 0.0


def pays(ops: Ops, op: Op, args: tuple[int, ...], home: str, rows: dict[str, int]) -> bool:
    """Whether the pairs `home` are the place for `op`.

    Args:
        ops: where its operands stand.
        op: the value, of the edges or of the pairs.
        args: its operands.
        home: `src_pair` or `dst_pair`.
        rows: rows of each domain.
    """
    if category(ops, op) != "inline":
        return True
    count = _Count()
    if not _count(ops, op, args, home, count) or not count.work:
        return True
    edges, pairs, width = rows["edge"], rows[home], op.type.numel
    on_edges = 2 * edges * (count.read + count.work)
    on_pairs = 2 * pairs * (count.read + count.work + width) + edges * (1 + width)
    return on_pairs < on_edges


def row_operands(op: Op, args: tuple[int, ...]) -> tuple[int, ...]:
    """The operands that have a row for each row of the result."""
    return args[:1] if op.kind in ("linear", "linear_t") else args


def _count(ops: Ops, op: Op, args: tuple[int, ...], home: str, count: _Count) -> bool:
    """Add what computing `op` takes; False if it is computed from a value that pairs hold."""
    count.work += _work(ops, op, args)
    for arg in row_operands(op, args):
        value = ops[arg]
        if value.kind == "gather" and map_target(value.map) == home:
            value = ops[value.args[0]]
        if value.kind == "gather":
            if map_target(value.map) not in TYPE_DOMAINS:  # parameters are read from cache
                count.read += value.type.numel
            continue
        if value.kind not in MOVABLE or category(ops, value) != "inline":
            return False
        if not _count(ops, value, value.args, home, count):
            return False
    return True


def _work(ops: Ops, op: Op, args: tuple[int, ...]) -> float:
    """Arithmetic that is not hidden behind the reading of operands, in moved elements."""
    if op.kind in ("linear", "linear_t"):
        return prod(ops[args[1]].type.shape) * MULTIPLY_ADD
    if op.kind == "reduce":
        wide = ops[args[0]].type.numel
        return wide * MULTIPLY_ADD if wide > 1 else 0
    return op.type.numel * FUNCTION if op.kind in COSTLY else 0
