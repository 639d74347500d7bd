"""Triton for one traversal: a program per few center rows, their inner rows a block at a time.

A traversal with inner rows is a kernel for center rows of at most `Choice.long_row` inner rows,
several to a program, and one, of twice the warps, for longer ones, which a list names and
some programs share out, one at a time. Those of more than `Choice.hub` are left to the kernels of
`hubs`, of which each is many programs'. Every row belongs to one of these, so sums keep their
order. They are taken in float32 (float64 for float64).

Inner rows of several center rows lie side by side, the center rows innermost. So laid over threads,
a warp reads whole rows, and what a thread sums for one center row it has read itself: most graphs
have few inner rows to a center row, and a program for each would leave most of its threads idle.
"""

from __future__ import annotations

from dataclasses import dataclass

from dataeff.rgnn.kernels_ir import Schedule
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.triton.emit import Emitter
from dataeff.rgnn.triton.hubs import HubKernels, write_hubs

# Center rows of a program, and inner rows of each that it reads at a time.
MAX_ROWS, INNER_ROWS = 128, 4
# Inner rows that a program for one long row reads at a time.
LONG_BLOCK = 64
# How traversals are compiled. Left to itself, the assembler spills 8 bytes of some kernels to stay
# at 40 registers. A product fused with the subtraction of a maximum is not the product whose
# maximum it is, which takes three digits from the softmax of scores of 1e4.
MAX_REGISTERS, FP_FUSION = 255, False

_SHORT_ROWS = ["i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)", "i_mask = i < rows"]
# What is the same for all rows is not held in registers, of which there are none to spare.
_SHARE = "tl.program_id(0), tl.load(num_long), tl.num_programs(0), disable_licm=True"
_EACH_LONG_ROW = f"for n in tl.range({_SHARE}):"
_LONG_ROW = [
    "row = tl.load(long_rows + n).to(tl.int64)",
    "i = row + tl.arange(0, 1)",
    "i_mask = i < rows",
]


@dataclass(frozen=True)
class TritonKernel:
    """A generated kernel, its arguments in order, and how to launch it.

    `block` is the number of inner rows that it reads at a time for each of `rows_per_program`
    center rows. With `map`, the text holds `<name>_long` beside it: it takes the list of rows that
    have more than `long_row` inner rows along the map, and at most `hub`, and how many they are,
    then what the kernel takes, for any number of programs. It has `long_warps`, a block of
    `long_block`, and `long_stages` of them under way. So do the kernels of `hubs`, which take the
    pieces of longer rows and a buffer before that.
    """

    name: str
    text: str
    arguments: tuple[tuple[str, int | str], ...]
    rows_per_program: int
    num_warps: int
    map: str | None = None
    long_warps: int = 8
    long_row: int = 128
    block: int = 1
    long_block: int = 1
    hub: int = 4096
    hubs: HubKernels | None = None
    long_stages: int = 1

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of all functions in the text, the kernel's own first."""
        if self.hubs is None:
            return (self.name,)
        return (self.name, f"{self.name}_long", *self.hubs.names)


def traversal_kernel(
    schedule: Schedule,
    number: int,
    contiguous: tuple[str, ...],
    double: bool,
    choice: Choice | None = None,
) -> TritonKernel:
    """Generate the kernel of the traversal that is step `number`.

    `choice` has the sizes of its blocks, its warps and what a long row is.
    """
    return _Writer(schedule, number, contiguous, double).write(choice or Choice())


class _Writer(Emitter):
    def write(self, choice: Choice) -> TritonKernel:
        for step in self.phases.passes():
            self.walk(step)
            self.finish(step)
        for sink in self.kernel.sinks:
            if not self.phases.is_inner_store(sink):
                self.store(self.outer, sink, self.emit(sink, self.center), self.center)
        elements = max(1, choice.block_elements // self.widest)
        if self.kernel.map is not None:
            return self._along(self.kernel.map, elements, choice)
        rows = min(MAX_ROWS, elements)
        text = self.function(self.name, "", _SHORT_ROWS, (rows, 1))
        warps = self._warps(rows, choice)
        return TritonKernel(self.name, text, tuple(self.arguments), rows, warps, block=rows)

    def _along(self, name: str, elements: int, choice: Choice) -> TritonKernel:
        """The kernels along a map, which hold `elements` rows of the widest value at a time."""
        block = min(INNER_ROWS, elements)
        rows = min(MAX_ROWS, elements // block)
        long = min(LONG_BLOCK, 2 * elements)
        bounds, steps = self.bounds(name), "steps = tl.max(last - first, 0)"
        only_short = [
            f"i_mask = i_mask & (last - first <= {choice.long_row})",
            "last = tl.where(i_mask, last, first)",
        ]
        short_head = [*_SHORT_ROWS, *bounds, *only_short, steps]
        long_head = [*_LONG_ROW, *bounds, steps]
        texts = [
            self.function(self.name, "", short_head, (rows, block)),
            self.function(
                *(f"{self.name}_long", "long_rows, num_long, ", long_head, (1, long)),
                *(", long rows", choice.long_stages, _EACH_LONG_ROW),
            ),
        ]
        hub = max(choice.hub, choice.long_row)
        hubs = write_hubs(self, hub, long, choice.long_stages)
        return TritonKernel(
            self.name,
            "\n".join([*texts, *hubs.texts]),
            tuple(self.arguments),
            rows,
            self._warps(rows * block, choice),
            name,
            2 * self._warps(long // 2, choice),
            choice.long_row,
            block,
            long,
            hub,
            hubs,
            choice.long_stages,
        )

    def _warps(self, rows: int, choice: Choice) -> int:
        """Warps for so many rows at a time: one where they are narrow."""
        return choice.num_warps if rows * self.widest >= 1024 else 1
