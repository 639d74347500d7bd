"""A factor of each relation goes into the relation's weight, where the weights are the fewer.

`s[r] * <x W[r], y>` is `<x (s[r] W[r]), y>`, and likewise for the product alone: no edge then reads
its relation, and the gradient of the factor comes from that of the weight, not from every edge. So
it is with the prior that scales the scores of HGT (arXiv 2003.01332, section 3.2).
"""

from __future__ import annotations

from dataeff.rgnn.ir import Builder, Op, Program, Type, rewrite

_SAME_RELATION = ("edge.src_pair", "edge.dst_pair")  # maps to rows of the relation that reads them


def scale_weights(program: Program, rows: dict[str, int]) -> Program:
    """Scale weights instead of rows; `rows` are the rows of each domain."""
    users = program.users()

    def rule(b: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        for here in (0, 1) if op.kind == "mul" else ():
            pick, value = b[args[1 - here]], program[op.args[here]]
            if pick.kind != "gather" or not pick.map.endswith(".etype") or value.type != op.type:
                continue
            factor = b[pick.args[0]]
            path = _path(program, users, value, factor.type)
            if path is None:
                continue
            weight = b[_at(b, args[here], path).args[1]]
            if rows["etype"] * weight.type.numel <= rows[op.type.domain]:
                return _scaled(b, args[here], path, factor)
        return None

    return rewrite(program, rule)


def _path(program: Program, users: list[list[int]], op: Op, factor: Type) -> tuple[int, ...] | None:
    """Which operand leads, step by step, to a product with a weight of relations.

    None if there is no such product that nothing else reads, or if a factor is not one number for
    all that the product sums up.
    """
    alone = len(users[op.id]) == 1 and op.id not in program.outputs
    if not alone or not _fits(factor, op.type):
        return None
    if op.kind == "linear":
        x, weight = (program[a].type for a in op.args)
        fits = weight.domain == "etype" and len(factor.shape) < len(x.shape)
        return () if fits else None
    through = op.kind in ("mul", "reduce", "neg")
    if through or (op.kind == "gather" and op.map in _SAME_RELATION):
        for position, arg in enumerate(op.args):
            rest = _path(program, users, program[arg], factor)
            if rest is not None:
                return position, *rest
    return None


def _fits(factor: Type, value: Type) -> bool:
    """Whether a factor is one number for all that an element of its axes holds."""
    if len(factor.shape) > len(value.shape):
        return False
    return all(n in (1, m) for n, m in zip(factor.shape, value.shape, strict=False))


def _at(b: Builder, value: int, path: tuple[int, ...]) -> Op:
    for position in path:
        value = b[value].args[position]
    return b[value]


def _scaled(b: Builder, value: int, path: tuple[int, ...], factor: Op) -> int:
    """The value again, made of a product with a scaled weight."""
    op = b[value]
    if not path:
        scaled = b.emit("mul", op.args[1], factor.id, line=op.line)
        return b.emit("linear", op.args[0], scaled, line=op.line)
    position, *rest = path
    inner = _scaled(b, op.args[position], tuple(rest), factor)
    return b.copy(op, (*op.args[:position], inner, *op.args[position + 1 :]))
