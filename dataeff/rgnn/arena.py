"""One block of memory for all large values of a run that pass, and where in it each one stands.

Values are alive from the step that makes them to the last step that uses their memory. Two that are
never alive together may share bytes, so that the block is about as large as what is alive at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dataeff.rgnn.ir import Type
from dataeff.rgnn.kernels_ir import Dense, Gemm, Schedule
from dataeff.rgnn.memory_plan import makes, overwritten, passing
from dataeff.rgnn.view import View

ALIGNMENT = 4096  # of the places, in bytes
# Values smaller than this are left to malloc. It gives back to the system what stands free at the
# end of its memory, which smaller values of one run are as well: where it did, inference of HGT on
# 58 thousand edges took 1.5 to 1.9 times as long, and 1.03 times as long where it did not.
SMALLEST_NBYTES = 64 << 10


@dataclass(frozen=True)
class Life:
    """From when to when a value's memory is used, by step number, and how many bytes it takes."""

    first: int
    last: int
    nbytes: int

    def meets(self, other: Life) -> bool:
        """Whether there is a step at which both are used."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Places:
    """Where values stand in a block of `nbytes` bytes: the offset of each."""

    offsets: Mapping[int, int]
    nbytes: int


def place(lives: Mapping[int, Life]) -> Places:
    """The largest value first, each at the lowest offset that is free for all of its life."""
    offsets: dict[int, int] = {}
    end = 0
    for value in sorted(lives, key=lambda v: (-lives[v].nbytes, lives[v].first)):
        life, offset = lives[value], 0
        for taken in sorted((v for v in offsets if life.meets(lives[v])), key=offsets.__getitem__):
            if offset + life.nbytes <= offsets[taken]:
                break
            offset = max(offset, _aligned(offsets[taken] + lives[taken].nbytes))
        offsets[value] = offset
        end = max(end, offset + life.nbytes)
    return Places(offsets, end)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Passing:
    """A value that passes, made by a kernel in memory that it is given; steps as in `Life`."""

    value: int
    type: Type
    first: int
    last: int


def passing_values(schedule: Schedule) -> list[Passing]:
    """The values of a schedule that can stand in its block."""
    over, until, found = overwritten(schedule), passing(schedule), []
    program = schedule.program
    for number, step in enumerate(schedule.steps):
        outer = isinstance(step, Gemm) and program[step.op].kind == "outer"
        if outer or isinstance(step, Dense) or number in over:
            continue
        found += [
            Passing(v, program[v].type, number, until[v])
            for v in makes(schedule, number)
            if v in until
        ]
    return found


def lives(values: Iterable[Passing], sizes: tuple[int, ...], item_size: int) -> dict[int, Life]:
    """Those of at least `SMALLEST_NBYTES` on a graph of these sizes."""
    found = {}
    for v in values:
        nbytes = View.rows_of(sizes, v.type.domain) * v.type.numel * item_size
        if nbytes >= SMALLEST_NBYTES:
            found[v.value] = Life(v.first, v.last, nbytes)
    return found
