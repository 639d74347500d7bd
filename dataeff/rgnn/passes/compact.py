"""Compact materialisation: compute a value once per (node, relation) pair instead of per edge.

A value of the edges that depends only on one end and the relation moves to that end's pairs, one
that depends only on the end to its nodes, one that depends only on the relation to the relations.
What reads it follows through one gather (Hector, ASPLOS'24, section 3.3; here on both sides).
Nodes and relations are always few; whether pairs are few enough is for `pair_cost` to say.
"""

from __future__ import annotations

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Builder, Op, Program, rewrite
from dataeff.rgnn.passes.pair_cost import MOVABLE, PAIRS, Ops, pays, row_operands

# From few rows to many: the first domain whose maps explain every operand is taken.
_HOMES = (
    ("one", frozenset({"one"})),
    ("ntype", frozenset({"ntype", "one"})),
    ("etype", frozenset({"etype", "one"})),
    ("node", frozenset({"src", "ntype", "one"})),
    ("dst", frozenset({"dst", "ntype", "one"})),
    ("src_pair", frozenset({"src", "etype", "src_pair", "one"})),
    ("dst_pair", frozenset({"dst", "etype", "dst_pair", "one"})),
)
_ROLES = {"node": "src", "dst": "dst"}


def compact(program: Program, rows: dict[str, int] | None = None) -> Program:
    """Move every value to the coarsest domain it depends on.

    Args:
        program: what to rewrite.
        rows: rows of each domain; values that do not pay on pairs are left where they are. Without
            them every value moves.
    """

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        home = _home_of(b, op, args)
        if home is None or (rows is not None and not _worth(b, op, args, home, rows)):
            return None
        return _move(b, op, args, len(row_operands(op, args)), home)

    return rewrite(program, rule)


def left_on_edges(program: Program, rows: dict[str, int]) -> list[tuple[Op, str]]:
    """The values of edges that one end and the relation determine, and the pairs that do."""
    found = []
    for op in program.ops:
        home = _home_of(program, op, op.args)
        if home in PAIRS and home is not None and not _worth(program, op, op.args, home, rows):
            found.append((op, home))
    return found


def _worth(ops: Ops, op: Op, args: tuple[int, ...], home: str, rows: dict[str, int]) -> bool:
    return home not in PAIRS or op.type.domain != "edge" or pays(ops, op, args, home, rows)


def _home_of(ops: Ops, op: Op, args: tuple[int, ...]) -> str | None:
    """Where a value can move."""
    if op.kind not in MOVABLE or op.type.domain in domains.TYPE_DOMAINS:
        return None
    rows = row_operands(op, args)
    if any(ops[a].kind != "gather" or _role(ops[a]) == "given" for a in rows):
        return None
    depends = {_role(ops[a]) for a in rows}
    if len(rows) < len(args):
        depends.add(ops[args[1]].type.domain)
    return _home(op.type.domain, depends)


def _role(op: Op) -> str:
    return op.map.partition(".")[2]


def _home(domain: str, depends: set[str]) -> str | None:
    """The coarsest domain that all dependencies lead out of, if it is coarser than `domain`."""
    for home, roles in _HOMES:
        if home == domain:
            return None
        role = _ROLES.get(home, home) if domain == "edge" else _pair_role(home)
        if depends <= roles and f"{domain}.{role}" in domains.MAPS:
            return home
    return None


def _pair_role(home: str) -> str:
    return {"node": "src"}.get(home, home)


def _move(b: Builder, op: Op, args: tuple[int, ...], num_rows: int, home: str) -> int:
    """Emit `op` in the domain `home` and gather its result back."""
    moved = []
    for position, arg in enumerate(args):
        if position >= num_rows:
            moved.append(arg)
            continue
        gather = b[arg]
        value = gather.args[0]
        if b[value].type.domain != home:
            role = _role(gather)
            value = b.emit("gather", value, attrs=(f"{home}.{role}",), line=gather.line)
        moved.append(value)
    made = b.emit(op.kind, *moved, attrs=op.attrs, line=op.line)
    role = "src" if home == "node" else home
    return b.emit("gather", made, attrs=(f"{op.type.domain}.{role}",), line=op.line)
