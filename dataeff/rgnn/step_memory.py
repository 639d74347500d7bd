"""What a training step holds at its peak, over features, edges, parameters and gradients.

    share = peak / (inputs + outputs + edges + gradients of inputs and outputs)

Edges are counted as three int64 each, as PyTorch Geometric holds them. A program whose share is too
large is compiled again with products of pairs made some columns at a time.
"""

from __future__ import annotations

from dataeff.memory.scratch import SMALLEST_LENT_NBYTES
from dataeff.rgnn.arena import lives, passing_values, place
from dataeff.rgnn.kernels_ir import Schedule
from dataeff.rgnn.lower import is_wide
from dataeff.rgnn.memory_plan import moments
from dataeff.rgnn.split import Halves
from dataeff.rgnn.view import View

MOST_SHARE = 3.05  # views and passing values of parameters are counted in full, a few hundredths
ID_NBYTES = 24


def peak_nbytes(schedule: Schedule, sizes: tuple[int, ...], item_size: int) -> int:
    """Bytes that a run takes at once: one block for what passes, and what else is alive."""
    found = lives(passing_values(schedule), sizes, item_size)
    others = (
        sum(n for v, n in moment.alive.items() if v not in found)
        for moment in moments(schedule, sizes, item_size)
    )
    return place(found).nbytes + max(others, default=0)


def share_of_step(
    halves: Halves,
    forward: Schedule,
    backward: Schedule,
    sizes: tuple[int, ...],
    item_size: int,
) -> float:
    """The peak of a training step over its tensors."""

    def nbytes(schedule: Schedule, *values: int) -> int:
        types = [schedule.program[v].type for v in values]
        return sum(View.rows_of(sizes, t.domain) * t.numel * item_size for t in types)

    program = halves.forward
    inputs = nbytes(forward, *(op.id for op in program.inputs))
    outputs = nbytes(forward, *program.outputs[: halves.num_outputs])
    saved = nbytes(forward, *program.outputs[halves.num_outputs :])
    ids = View.rows_of(sizes, "edge") * ID_NBYTES
    peak = max(
        peak_nbytes(forward, sizes, item_size),
        outputs + saved + peak_nbytes(backward, sizes, item_size),
    )
    held = inputs + outputs + ids
    return (held + peak) / max(held + inputs + outputs, 1)


def is_large(schedule: Schedule, sizes: tuple[int, ...], item_size: int) -> bool:
    """Whether a value of pairs or edges is so large that memory is a matter of its own."""
    types = [schedule.program[v].type for v in schedule.stored if is_wide(schedule.program[v])]
    largest = max((View.rows_of(sizes, t.domain) * t.numel for t in types), default=0)
    return largest * item_size >= SMALLEST_LENT_NBYTES
