"""The order of the passes; each result is verified and recorded for `explain`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dataeff.rgnn.ir import Program
from dataeff.rgnn.passes.aggregate_first import aggregate_first
from dataeff.rgnn.passes.canonicalise import canonicalise
from dataeff.rgnn.passes.compact import compact
from dataeff.rgnn.passes.cse import eliminate_common_subexpressions
from dataeff.rgnn.passes.dce import eliminate_dead_code
from dataeff.rgnn.passes.fold_types import fold_types
from dataeff.rgnn.passes.reassociate import reassociate
from dataeff.rgnn.passes.reorder import reorder
from dataeff.rgnn.passes.scale_weights import scale_weights
from dataeff.rgnn.passes.spread import spread
from dataeff.rgnn.verify import verify
from dataeff.rgnn.view import SIZE_ORDER

Pass = tuple[str, Callable[[Program], Program]]
Stages = list[tuple[str, Program]]

# What can be left out, to see what it is worth: passes over programs, and what `lower` does.
PASSES = (
    *("canonicalise", "cse", "dce", "compact", "reorder", "scale_weights", "fold_types"),
    *("aggregate_first", "spread", "reassociate", "narrow"),
)
OPTIONAL = (*PASSES, "fuse", "memory_plan")


def rows_of(sizes: tuple[int, ...]) -> dict[str, int]:
    """Rows of each domain by its name."""
    return {**dict(zip(SIZE_ORDER, sizes, strict=True)), "one": 1}


def optimise(
    program: Program, sizes: tuple[int, ...], stages: Stages, disabled: frozenset[str] = frozenset()
) -> Program:
    """The passes over a forward program, before it is differentiated.

    Args:
        program: what was traced.
        sizes: rows of each domain, which the cost models read.
        stages: (pass name, program after it) is appended for each pass that changed something.
        disabled: names of `OPTIONAL` passes to leave out.
    """
    rows = rows_of(sizes)
    passes: list[Pass] = [
        ("canonicalise", canonicalise),
        ("cse", eliminate_common_subexpressions),
        ("compact", compact),
        ("cse", eliminate_common_subexpressions),
        ("dce", eliminate_dead_code),
        ("reorder", partial(reorder, rows=rows)),
        ("scale_weights", partial(scale_weights, rows=rows)),
        ("dce", eliminate_dead_code),
        ("fold_types", partial(fold_types, rows=rows)),
        ("dce", eliminate_dead_code),
        ("aggregate_first", partial(aggregate_first, rows=rows)),
        ("canonicalise", canonicalise),
        ("dce", eliminate_dead_code),
        ("spread", partial(spread, rows=rows)),
        ("dce", eliminate_dead_code),
    ]
    return _run(program, [p for p in passes if p[0] not in disabled], stages, "")


def optimise_joint(
    program: Program, sizes: tuple[int, ...], stages: Stages, disabled: frozenset[str] = frozenset()
) -> Program:
    """The passes over a joint program: forward, then what differentiation appended."""
    rows = None if "spread" in disabled else rows_of(sizes)
    passes: list[Pass] = [
        ("canonicalise", canonicalise),
        ("cse", eliminate_common_subexpressions),
        ("reassociate", reassociate),
        ("compact", partial(compact, rows=rows)),
        ("canonicalise", canonicalise),
        ("cse", eliminate_common_subexpressions),
        ("dce", eliminate_dead_code),
    ]
    return _run(program, [p for p in passes if p[0] not in disabled], stages, "joint ")


def _run(program: Program, passes: list[Pass], stages: Stages, prefix: str) -> Program:
    for name, run in passes:
        changed = verify(run(program))
        if changed != program:
            stages.append((prefix + name, changed))
        program = changed
    return program
