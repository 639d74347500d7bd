"""The order of the passes; each result is verified and recorded for `explain`."""

from __future__ import annotations

from collections.abc import Callable

from dataeff.rgnn.ir import Program
from dataeff.rgnn.passes.cse import eliminate_common_subexpressions
from dataeff.rgnn.passes.dce import eliminate_dead_code
from dataeff.rgnn.verify import verify


def optimise(
    program: Program,
    sizes: tuple[int, ...],
    stages: list[tuple[str, Program]],
    *,
    joint: bool = False,
) -> Program:
    """Run the passes on a forward program, or on a joint one after differentiation."""
    passes: list[tuple[str, Callable[[Program], Program]]] = [
        ("cse", eliminate_common_subexpressions),
        ("dce", eliminate_dead_code),
    ]
    for name, run in passes:
        changed = verify(run(program))
        if changed != program:
            stages.append((f"joint {name}" if joint else name, changed))
        program = changed
    return program
