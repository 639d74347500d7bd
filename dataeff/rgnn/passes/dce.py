"""Dead code elimination: drop what no output needs. Inputs that nothing reads go too."""

from __future__ import annotations

from dataeff.rgnn.ir import Builder, Program


def eliminate_dead_code(program: Program) -> Program:
    """Keep the operations that the outputs depend on."""
    live = set(program.outputs)
    for op in reversed(program.ops):
        if op.id in live:
            live.update(op.args)
    if len(live) == len(program.ops):
        return program
    builder = Builder()
    new: dict[int, int] = {}
    for op in program.ops:
        if op.id in live:
            new[op.id] = builder.copy(op, (new[a] for a in op.args))
    return builder.program(new[o] for o in program.outputs)
