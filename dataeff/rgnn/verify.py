"""The verifier: run after tracing and after each pass."""

from __future__ import annotations

from dataeff.rgnn.ir import Program
from dataeff.rgnn.signatures import infer


def verify(program: Program) -> Program:
    """Return `program` if it is well formed.

    Raises:
        ValueError: ids out of order, an operand that is not defined earlier, a wrong type, an
            output that does not exist, or two inputs of one name.
    """
    for position, op in enumerate(program.ops):
        if op.id != position:
            raise ValueError(f"operation {position} is numbered %{op.id}")
        for arg in op.args:
            if not 0 <= arg < position:
                raise ValueError(
                    f"%{op.id} = {op.kind} reads %{arg}, which is not defined before it"
                )
        given = op.type if op.kind in ("input", "const") else None
        inferred = infer(op.kind, [program[a].type for a in op.args], op.attrs, given)
        if inferred != op.type:
            raise ValueError(f"%{op.id} = {op.kind} has type {op.type} but should have {inferred}")
    for output in program.outputs:
        if not 0 <= output < len(program.ops):
            raise ValueError(f"the program returns %{output}, which does not exist")
    names = [op.attrs[0] for op in program.inputs]
    if len(names) != len(set(names)):
        raise ValueError(f"two inputs share a name: {names}")
    return program
