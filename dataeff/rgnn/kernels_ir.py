"""The intra-operator IR: the kernels that a program is carried out by, in order.

Two templates, as in Hector (ASPLOS'24, section 3.4). A `Gemm` multiplies rows, gathered through a
map, with typed weights. A `Traversal` walks the rows of its center domain and, inside each, the
rows that a map leads to it; whatever is not stored is computed in registers. A `Dense` step works
on parameter-sized values with plain PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dataeff.rgnn.ir import Program
from dataeff.rgnn.text import render_op


@dataclass
class Traversal:
    """Loop over `center` rows and, if `map` is set, over the rows that the map leads there.

    `sinks` are the values it stores, in program order: reductions along the map, values of the
    center, or values of the inner rows.
    """

    center: str
    map: str | None
    sinks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Gemm:
    """A typed product: `linear`, `linear_t` or `outer`.

    `rows` is the materialised operand whose rows are read through `gather` (a map name) if set.
    """

    op: int
    rows: int
    gather: str | None


@dataclass(frozen=True)
class Dense:
    """An operation on parameter-sized values, or a reduction to them."""

    op: int


Step = Traversal | Gemm | Dense


@dataclass(frozen=True)
class Schedule:
    """A program and the steps that carry it out; `stored` are the values kept in memory."""

    program: Program
    steps: tuple[Step, ...]
    stored: frozenset[int]

    def kept(self, number: int) -> list[int]:
        """Sinks of a traversal that others read; the rest never leave its registers."""
        step = self.steps[number]
        assert isinstance(step, Traversal)
        wanted = set(self.program.outputs)
        for other, reader in enumerate(self.steps):
            if other != number:
                wanted |= self.reads(reader)
        return [s for s in step.sinks if s in wanted]

    def reads(self, step: Step) -> set[int]:
        """Stored values that a step reads."""
        if isinstance(step, Gemm):
            return {step.rows, self.program[step.op].args[1]}
        if isinstance(step, Dense):
            return set(self.program[step.op].args)
        found: set[int] = set()
        seen: set[int] = set()
        stack = [a for s in step.sinks for a in self.program[s].args]
        while stack:
            value = stack.pop()
            if value in self.stored:
                found.add(value)
            elif value not in seen:
                seen.add(value)
                stack.extend(self.program[value].args)
        return found


def render_schedule(schedule: Schedule) -> str:
    """One block of text per step."""
    blocks = []
    for number, step in enumerate(schedule.steps):
        if isinstance(step, Traversal):
            head = f"k{number}: traversal over {step.center}"
            head += f", inside along {step.map}" if step.map else ""
            kept = schedule.kept(number)
            lines = [
                f"  {'store' if v in kept else 'hold'} {render_op(schedule.program[v])}"
                for v in step.sinks
            ]
            blocks.append("\n".join([head, *lines]))
        elif isinstance(step, Gemm):
            via = f" through {step.gather}" if step.gather else ""
            op = render_op(schedule.program[step.op])
            blocks.append(f"k{number}: gemm, rows of %{step.rows}{via}\n  {op}")
        else:
            blocks.append(f"k{number}: dense\n  {render_op(schedule.program[step.op])}")
    return "\n".join(blocks) + "\n"
