"""Make products of pairs some columns at a time, so that less of them is in memory at once.

On a dense graph nearly every edge has a pair of its own: `linear(x[src], W[etype])` takes as many
rows as there are edges, and is most of what a training step holds. Where it is only multiplied with
other values and added up, its columns need not be there together: an inner product is the sum of
those of the columns, and a sum over edges is made column by column. Gradients follow.

It reads rows and indices again for each part, so it is for `step_memory` to say where it is needed.
"""

from __future__ import annotations

from dataeff.rgnn.ir import Builder, Op, Program, rewrite
from dataeff.rgnn.lower import SMALL_PRODUCT, category
from dataeff.rgnn.passes.pair_cost import PAIRS
from dataeff.rgnn.signatures import BINARY, UNARY

_ENDS = ("sum", "max")


def narrow(program: Program, parts: int) -> Program:
    """Split every product of pairs that can be into so many parts of its columns."""
    users = program.users()
    split: dict[int, int] = {}
    for op in program.ops:
        if _is_wide_product(program, op, parts):
            found = _columnwise(program, users, op)
            split |= dict.fromkeys(found, op.type.shape[-1] // parts)
    if not split:
        return program
    made: dict[int, list[int]] = {}

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        if op.id in split:
            width = split[op.id]
            made[op.id] = [
                _columns(b, op, args, made, part * width, (part + 1) * width, part)
                for part in range(parts)
            ]
        elif op.args and op.args[0] in made:
            pieces = [b.copy(op, (piece,)) for piece in made[op.args[0]]]
            if op.kind in _ENDS:
                return b.emit("concat", *pieces, line=op.line)
            total = pieces[0]
            for piece in pieces[1:]:
                total = b.emit("add", total, piece, line=op.line)
            return total
        return None

    return rewrite(program, rule)


def _is_wide_product(program: Program, op: Op, parts: int) -> bool:
    if op.kind != "linear" or op.type.domain not in PAIRS or category(program, op) != "gemm":
        return False
    has_columns = len(op.type.shape) >= len(program[op.args[0]].type.shape)
    width = op.type.shape[-1] if has_columns else 0
    return width % parts == 0 and width // parts > SMALL_PRODUCT


def _columnwise(program: Program, users: list[list[int]], product: Op) -> set[int]:
    """The product and what is computed from it column by column; nothing if it is needed whole."""
    found, stack = {product.id}, [product.id]
    shape = product.type.shape
    while stack:
        value = stack.pop()
        if value in program.outputs:
            return set()
        for user in map(program.__getitem__, users[value]):
            if user.kind in _ENDS or (user.kind == "reduce" and _sums_columns(user, shape)):
                continue
            if user.kind not in (*UNARY, *BINARY, "gather") or user.type.shape != shape:
                return set()
            if user.id not in found:
                found.add(user.id)
                stack.append(user.id)
    return found


def _sums_columns(op: Op, shape: tuple[int, ...]) -> bool:
    return len(op.type.shape) < len(shape) or op.type.shape[-1] == 1


def _columns(
    b: Builder,
    op: Op,
    args: tuple[int, ...],
    made: dict[int, list[int]],
    start: int,
    stop: int,
    part: int,
) -> int:
    """Columns `start:stop` of a value."""
    if op.kind == "linear":
        weight = b.emit("slice", args[1], attrs=(start, stop), line=op.line)
        rows = b[args[0]]
        if rows.kind == "gather":  # one for each part: gradients are then added up at the nodes
            return b.emit("linear", b.copy(rows, rows.args), weight, line=op.line)
        return b.emit("linear", rows.id, weight, line=op.line)
    operands = [
        made[old][part] if old in made else _sliced(b, new, len(op.type.shape), start, stop)
        for old, new in zip(op.args, args, strict=True)
    ]
    return b.copy(op, operands)


def _sliced(b: Builder, value: int, rank: int, start: int, stop: int) -> int:
    """Columns of an operand, taken before it is gathered: its gradient is then as narrow."""
    op = b[value]
    if len(op.type.shape) < rank or op.type.shape[-1] == 1:
        return value  # the same for all columns
    if op.kind == "gather":
        return b.emit("gather", _sliced(b, op.args[0], rank, start, stop), attrs=op.attrs)
    return b.emit("slice", value, attrs=(start, stop), line=op.line)
