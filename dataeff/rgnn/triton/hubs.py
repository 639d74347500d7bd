"""Triton for hubs: center rows of more inner rows than one program is to read.

A hub is cut into pieces of `hub` inner rows. Each pass over its inner rows is a kernel of a program
per piece, which leaves the piece's accumulators in a scratch buffer, [pieces, width]: sums, maxima,
and for a sum of exponentials the maximum that it is relative to as well. A pass that reads what an
earlier one has reduced first adds up the pieces of its row, and a last kernel does so for what is
stored at center rows. Pieces are added up in their order, so whatever the schedule, and without
atomics, a sum has one result.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dataeff.rgnn.ir import Op
from dataeff.rgnn.phases import Pass
from dataeff.rgnn.triton import reductions
from dataeff.rgnn.triton.emit import Emitter
from dataeff.rgnn.triton.text import Block, Row, lane, padded, padded_numel, trail

_FIRST = "hub_rows, hub_slots, parts, "
_HEAD = [
    "slot = tl.program_id(0).to(tl.int64)",
    "row = tl.load(hub_rows + slot).to(tl.int64)",
    "if row < 0:  # the host launches an upper bound of the number of pieces",
    "    return",
    "i = row + tl.arange(0, 1)",
    "i_mask = i < rows",
    "begin = tl.load(hub_slots + slot).to(tl.int64)  # of the row's first piece",
]


@dataclass(frozen=True)
class HubKernels:
    """The kernels of one traversal for hubs, in the order of their launches.

    Attributes:
        names: of the functions.
        texts: of each.
        width: numbers that a piece leaves in the buffer, of the dtype that sums are taken in.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    width: int


def write_hubs(rows: Emitter, hub: int, block: int, stages: int) -> HubKernels:
    """Generate the kernels for hubs of a traversal.

    Args:
        rows: what wrote the kernel of whole rows, whose arguments these take as well.
        hub: inner rows of a piece; longer rows are hubs.
        block: inner rows, or pieces, that a program reads at a time.
        stages: blocks of inner rows that are under way at a time.
    """
    return _HubWriter(rows, hub, block, stages).write()


class _HubWriter(Emitter):
    def __init__(self, rows: Emitter, hub: int, block: int, stages: int) -> None:
        super().__init__(rows.schedule, rows.number, rows.contiguous, rows.type == "tl.float64")
        self.arguments = rows.arguments
        self.hub, self.block, self.stages = hub, block, stages
        self.columns: dict[int, list[int]] = {}  # where in the buffer each accumulator stands
        self.pass_of: dict[int, Pass] = {}
        self.added_up: list[int] = []  # reductions of earlier passes that the kernel reads
        self.width = 0

    def write(self) -> HubKernels:
        name, hub = self.kernel.map, self.hub
        assert name is not None
        whole = [*_HEAD, *self.bounds(name)]
        whole += [f"pieces = tl.max((last - first + {hub - 1}) // {hub}, 0)"]
        piece = [
            f"first = first + ((slot - begin) * {hub}).to(first.dtype)",
            f"last = tl.minimum(first + {hub}, last)",
            "steps = tl.max(last - first, 0)",
        ]
        found = {}
        passes = self.phases.passes()
        for step in passes:
            self._place(step)
        for number, step in enumerate(passes):
            self._begin()
            self.walk(step)
            self._keep(step)
            function = f"{self.name}_hub{number}"
            kind = f", pieces of hubs, pass {number}"
            found[function] = self._kernel(function, [*whole, *piece], kind)
        sinks = [s for s in self.kernel.sinks if not self.phases.is_inner_store(s)]
        if sinks:
            self._begin()
            for sink in sinks:
                self.store(self.outer, sink, self.emit(sink, self.center), self.center)
            only_first = ["if begin != slot:  # one program for each hub", "    return"]
            function = f"{self.name}_hubs"
            found[function] = self._kernel(function, [*whole, *only_first], ", hubs")
        return HubKernels(tuple(found), tuple(found.values()), self.width)

    def _place(self, step: Pass) -> None:
        """Give the accumulators of a pass their places in the buffer."""
        self.pass_of |= dict.fromkeys(step.reductions, step)
        for value in step.accumulated:
            op = self.program[value]
            numel = padded_numel(op.type.shape)
            count = len(reductions.accumulators(op))
            self.columns[value] = [self.width + k * numel for k in range(count)]
            self.width += count * numel

    def _begin(self) -> None:
        self.clear()
        self.added_up = []

    def emit(self, value: int, row: Row) -> str:
        """As for any traversal; a reduction is an earlier pass's, which `_kernel` adds up."""
        if value not in self.pass_of:
            return super().emit(value, row)
        if value not in self.added_up:
            self.added_up.append(value)
        return f"acc{value}"

    def _kernel(self, name: str, head: list[str], kind: str) -> str:
        self.outer.lines = [*self._add_up(), *self.outer.lines]
        return self.function(name, _FIRST, head, (1, self.block), kind, self.stages)

    def _add_up(self) -> list[str]:
        """What adds up the pieces' accumulators of all reductions that the kernel reads."""
        if not self.added_up:
            return []
        out, inner = Block("    "), Block("        ")
        tops = {v: t for v in self.added_up if (t := self.pass_of[v].tops.get(v)) is not None}
        ops = [self.program[v] for v in dict.fromkeys(tops.get(v, v) for v in self.added_up)]
        for op in ops:
            reductions.start(op, out, self.type)
            inner_parts = [f"part{op.id}_{k}" for k in range(len(self.columns[op.id]))]
            for name, column in zip(inner_parts, self.columns[op.id], strict=True):
                mask = trail("e_mask", len(op.type.shape))
                inner.add(
                    f"{name} = tl.load({self._where('at', op, column)}, mask={mask}, other=0)"
                )
            reductions.merge(op, inner_parts, inner, self.type)
        out.add("for t in range(0, pieces, BLOCK):")
        out.add("    e_mask = t + tl.arange(0, BLOCK) < pieces")
        out.add("    at = begin + t + tl.arange(0, BLOCK)")
        out.lines += inner.lines
        for value, logsum in tops.items():
            reductions.take_top(self.program[value], logsum, out)
        for value in dict.fromkeys([*self.added_up, *(op.id for op in ops)]):
            reductions.finish(self.program[value], out)
        return out.lines

    def _keep(self, step: Pass) -> None:
        """Put the accumulators of a pass into the buffer."""
        for value in step.accumulated:
            op = self.program[value]
            names = reductions.accumulators(op)
            for name, column in zip(names, self.columns[value], strict=True):
                where = self._where("(slot + tl.arange(0, 1))", op, column)
                self.outer.add(f"tl.store({where}, {name})")

    def _where(self, slots: str, op: Op, column: int) -> str:
        """Pointers to one accumulator of some pieces, its axes padded."""
        shape = padded(op.type.shape)
        terms = [f"{trail(slots, len(shape))} * {self.width} + {column}"]
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        terms += [f"{lane(axis, shape)} * {stride}" for axis, stride in enumerate(strides)]
        return f"parts + {' + '.join(terms)}"
