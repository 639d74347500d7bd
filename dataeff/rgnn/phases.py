"""In which pass over its inner rows a traversal can compute each value.

A value that reads a reduction of the same segment needs another pass: softmax weights come in the
pass after the one that sums the exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass

from dataeff.rgnn.ir import Op
from dataeff.rgnn.kernels_ir import Schedule, Traversal
from dataeff.rgnn.signatures import SEGMENT


@dataclass(frozen=True)
class Pass:
    """One loop over the inner rows: what it reduces and what it stores for each of them.

    `tops` names, for each `top` whose operand's `logsum` the loop takes as well, that `logsum`: the
    maximum is found on the way to it.
    """

    reductions: tuple[int, ...]
    stores: tuple[int, ...]
    tops: dict[int, int]

    @property
    def accumulated(self) -> tuple[int, ...]:
        """The reductions that have accumulators of their own."""
        return tuple(v for v in self.reductions if v not in self.tops)


class Phases:
    """Assigns the sinks of one traversal to passes."""

    def __init__(self, schedule: Schedule, kernel: Traversal) -> None:
        self.program, self.stored = schedule.program, schedule.stored
        self.kernel = kernel
        self._inner: dict[int, int] = {}

    def passes(self) -> list[Pass]:
        """The loops, in order; none for a traversal without inner rows."""
        reductions = {
            s: self.of(self._op(s).args[0])
            for s in self.kernel.sinks
            if self._op(s).kind in SEGMENT
        }
        stores = {s: self.of(s) for s in self.kernel.sinks if self.is_inner_store(s)}
        count = 1 + max([*reductions.values(), *stores.values()], default=-1)
        made = [tuple(s for s, n in reductions.items() if n == k) for k in range(count)]
        return [
            Pass(each, tuple(s for s, n in stores.items() if n == k), self._tops(each))
            for k, each in enumerate(made)
        ]

    def _tops(self, reductions: tuple[int, ...]) -> dict[int, int]:
        ops = [self._op(s) for s in reductions]
        logsums = {op.args: op.id for op in ops if op.kind == "logsum"}
        return {op.id: logsums[op.args] for op in ops if op.kind == "top" and op.args in logsums}

    def is_inner_store(self, value: int) -> bool:
        """Whether a sink has a row for each inner row rather than for each center row."""
        op = self._op(value)
        return op.kind not in SEGMENT and op.type.domain != self.kernel.center

    def of(self, value: int) -> int:
        """The first pass in which a value of the inner rows can be computed."""
        if value not in self._inner:
            self._inner[value] = self._compute(self._op(value))
        return self._inner[value]

    def _compute(self, op: Op) -> int:
        if op.id in self.stored and op.id not in self.kernel.sinks:
            return 0
        if op.kind == "gather":
            return self._after(op.args[0]) if op.map == self.kernel.map else 0
        return max([self.of(a) for a in op.args], default=0)

    def _after(self, value: int) -> int:
        """The first pass that may read a center value: the one after what it is reduced in."""
        op = self._op(value)
        if op.id in self.stored and op.id not in self.kernel.sinks:
            return 0
        if op.kind in SEGMENT:
            return self.of(op.args[0]) + 1
        if op.kind == "gather":
            return 0
        return max([self._after(a) for a in op.args], default=0)

    def _op(self, value: int) -> Op:
        return self.program[value]
