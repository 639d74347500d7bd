"""The inter-operator IR: a straight list of operations in single assignment form.

Each value has a `Type`: the domain its rows belong to and the shape of one row. `Builder.emit` is
the only way to make an operation, for tracing, passes, differentiation and the parser alike, so no
program exists whose types do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

Attr = str | int | float | tuple[int, ...]


class IRTypeError(TypeError):
    """An operation was given operands whose domains or shapes do not fit it."""


@dataclass(frozen=True)
class Type:
    """Row domain and row shape of a value: `edge[4x16]`."""

    domain: str
    shape: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of one row."""
        return prod(self.shape)

    def __str__(self) -> str:
        return f"{self.domain}[{'x'.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Op:
    """One operation. `args` are the ids of earlier operations; `attrs` are positional constants."""

    id: int
    kind: str
    args: tuple[int, ...]
    attrs: tuple[Attr, ...]
    type: Type
    line: str = field(default="", compare=False)

    @property
    def map(self) -> str:
        """The row map of a gather or a reduction."""
        name = self.attrs[0]
        assert isinstance(name, str)
        return name


@dataclass(frozen=True)
class Program:
    """Operations in order, and the ids of the values that are returned."""

    ops: tuple[Op, ...]
    outputs: tuple[int, ...]

    def __getitem__(self, op_id: int) -> Op:
        return self.ops[op_id]

    @property
    def inputs(self) -> tuple[Op, ...]:
        """The `input` operations, in order."""
        return tuple(op for op in self.ops if op.kind == "input")

    def users(self) -> list[list[int]]:
        """For each value, the ids of the operations that read it."""
        result: list[list[int]] = [[] for _ in self.ops]
        for op in self.ops:
            for arg in dict.fromkeys(op.args):
                result[arg].append(op.id)
        return result


class Builder:
    """Appends operations, inferring and checking the type of each."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def emit(
        self,
        kind: str,
        *args: int,
        attrs: Sequence[Attr] = (),
        type: Type | None = None,
        line: str = "",
    ) -> int:
        """Append one operation and return its id.

        Args:
            kind: a name in `dataeff.rgnn.signatures.SIGNATURES`.
            *args: ids of its operands.
            attrs: its constants.
            type: its type where operands do not determine it (`input`, `const`, `degree`).
            line: where in the user's source it comes from.

        Raises:
            IRTypeError: the operands do not fit.
        """
        from dataeff.rgnn.signatures import infer  # the table needs Type, defined here

        types = [self.ops[a].type for a in args]
        result = infer(kind, types, tuple(attrs), type)
        self.ops.append(Op(len(self.ops), kind, tuple(args), tuple(attrs), result, line))
        return len(self.ops) - 1

    def copy(self, op: Op, args: Iterable[int]) -> int:
        """Append `op` with other operands."""
        given = op.type if op.kind in ("input", "const") else None
        return self.emit(op.kind, *args, attrs=op.attrs, type=given, line=op.line)

    def program(self, outputs: Iterable[int]) -> Program:
        """The operations so far, with these values returned."""
        return Program(tuple(self.ops), tuple(outputs))

    def __getitem__(self, op_id: int) -> Op:
        return self.ops[op_id]


Rewriter = Callable[[Builder, Op, tuple[int, ...]], "int | None"]


def rewrite(program: Program, rule: Rewriter) -> Program:
    """Rebuild `program`; `rule(builder, op, new_args)` returns a new id, or None to copy."""
    builder = Builder()
    new: list[int] = []
    for op in program.ops:
        args = tuple(new[a] for a in op.args)
        replaced = rule(builder, op, args)
        new.append(builder.copy(op, args) if replaced is None else replaced)
    return builder.program(new[o] for o in program.outputs)
