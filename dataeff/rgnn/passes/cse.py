"""Common subexpression elimination by value numbering."""

from __future__ import annotations

from dataeff.rgnn.ir import Attr, Builder, Op, Program, rewrite

_COMMUTATIVE = ("add", "mul", "maximum", "equal")


def eliminate_common_subexpressions(program: Program) -> Program:
    """Compute each value once: same operation, operands and constants."""
    numbers: dict[tuple[str, tuple[int, ...], tuple[Attr, ...]], int] = {}

    def rule(builder: Builder, op: Op, args: tuple[int, ...]) -> int | None:
        key_args = tuple(sorted(args)) if op.kind in _COMMUTATIVE else args
        key = (op.kind, key_args, op.attrs)
        if key not in numbers:
            numbers[key] = builder.copy(op, args)
        return numbers[key]

    result = rewrite(program, rule)
    return program if len(result.ops) == len(program.ops) else result
