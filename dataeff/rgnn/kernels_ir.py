"""The intra-operator IR: the kernels that a program is carried out by, in order.

Two templates, as in Hector (ASPLOS'24, section 3.4). A `Gemm` multiplies rows, gathered through a
map, with typed weights. A `Traversal` walks the rows of its center domain and, inside each, the
rows that a map leads to it; whatever is not stored is computed in registers. A `Dense` step works
on parameter-sized values with plain PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass, field

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Op, Program
from dataeff.rgnn.signatures import SEGMENT
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
    With `scatter`, a map out of a domain of pairs, the products are added up along it as they are
    made, and never stored: `op` is that sum, or a stored value and the sum.
    """

    op: int
    rows: int
    gather: str | None
    scatter: str | None = None


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

    def product(self, step: Gemm) -> Op:
        """The product that a step multiplies."""
        op = self.program[step.op]
        if step.scatter is None:
            return op
        if op.kind != "sum":
            op = self.program[summands(self.program, step.op, step.scatter)[1]]
        return self.program[op.args[0]]

    def onto(self, step: Gemm) -> int | None:
        """The stored value that a step adds its products to."""
        if step.scatter is None or self.program[step.op].kind == "sum":
            return None
        return summands(self.program, step.op, step.scatter)[0]

    def reads(self, step: Step) -> set[int]:
        """Stored values that a step reads."""
        if isinstance(step, Gemm):
            onto = self.onto(step)
            return {step.rows, self.product(step).args[1]} | (set() if onto is None else {onto})
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


def closure(program: Program, stored: Set[int], sink: int) -> set[int]:
    """The values computed in registers on the way to a stored one."""
    found: set[int] = set()
    stack = list(program[sink].args)
    while stack:
        value = stack.pop()
        if value not in found and value not in stored:
            found.add(value)
            stack.extend(program[value].args)
    return found


def summands(program: Program, total: int, along: str) -> tuple[int, int]:
    """Of what a step adds products to along a map, and the sum of them: both."""
    first, second = program[total].args
    is_sum = program[second].kind == "sum" and program[second].map == along
    return (first, second) if is_sum else (second, first)


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
            via += f", added up along {step.scatter}" if step.scatter else ""
            op = render_op(schedule.program[step.op])
            blocks.append(f"k{number}: gemm, rows of %{step.rows}{via}\n  {op}")
        else:
            blocks.append(f"k{number}: dense\n  {render_op(schedule.program[step.op])}")
    return "\n".join(blocks) + "\n"


_HEADS = {
    "traversal": re.compile(r"k(\d+): traversal over (\w+)(?:, inside along ([\w.]+))?"),
    "gemm": re.compile(
        r"k(\d+): gemm, rows of %(\d+)(?: through ([\w.]+))?(?:, added up along ([\w.]+))?"
    ),
    "dense": re.compile(r"k(\d+): dense"),
}
_BODY = re.compile(r"  (?:(store|hold) )?(%(\d+) = .*)")


def parse_schedule(text: str, program: Program) -> Schedule:
    """Read the steps of a program back; `parse_schedule(render_schedule(s), s.program)` is `s`.

    Raises:
        ValueError: a line that is no step, or that states another operation than the program has,
            or whether a value is stored where it is not; or what `verify_schedule` finds.
    """
    steps: list[Step] = []
    blocks = re.split(r"\n(?=k\d+: )", text.strip()) if text.strip() else []
    for block in blocks:
        head, *body = block.splitlines()
        kind, match = next(
            ((k, m) for k, p in _HEADS.items() if (m := p.fullmatch(head))), ("", None)
        )
        if match is None or int(match[1]) != len(steps):
            raise ValueError(f"not the head of step {len(steps)}: {head!r}")
        values = [_value(line, program) for line in body]
        if kind == "traversal":
            steps.append(Traversal(match[2], match[3], values))
        elif len(values) != 1:
            raise ValueError(f"step {len(steps)} carries out one operation, not {len(values)}")
        else:
            gemm = kind == "gemm"
            made = Gemm(values[0], int(match[2]), *match.groups()[2:]) if gemm else Dense(values[0])
            steps.append(made)
    schedule = Schedule(program, tuple(steps), _stored(program, steps))
    if render_schedule(schedule) != text:
        raise ValueError("the text states other values to be stored than the steps need")
    return verify_schedule(schedule)


def _value(line: str, program: Program) -> int:
    match = _BODY.fullmatch(line)
    value = int(match[3]) if match else -1
    if match is None or value >= len(program.ops) or render_op(program[value]) != match[2]:
        raise ValueError(f"not an operation of the program: {line.strip()!r}")
    return value


def _made(step: Step) -> list[int]:
    return step.sinks if isinstance(step, Traversal) else [step.op]


def _stored(program: Program, steps: list[Step]) -> frozenset[int]:
    """What steps make, and what is there before them."""
    made = {value for step in steps for value in _made(step)}
    return frozenset(made | {op.id for op in program.inputs})


def verify_schedule(schedule: Schedule) -> Schedule:
    """Return `schedule` if its steps can run in their order.

    Raises:
        ValueError: a value made twice or never, read before it is made, or that does not stand
            in the rows that its traversal walks.
    """
    program = schedule.program
    ready = {op.id for op in program.ops if op.kind in ("input", "const")}
    for number, step in enumerate(schedule.steps):
        if isinstance(step, Gemm) and step.scatter is not None:
            _check_sum(number, step, program)
        made = set(_made(step))
        missing = schedule.reads(step) - ready - made
        if missing:
            raise ValueError(f"k{number} reads {_names(missing)}, which no earlier step made")
        if made & ready or len(made) != len(_made(step)):
            raise ValueError(f"k{number} makes {_names(made & ready)} a second time")
        if isinstance(step, Traversal):
            _check_rows(number, step, program)
        ready |= made
    absent = set(program.outputs) - ready
    if absent:
        raise ValueError(f"no step makes the output {_names(absent)}")
    return schedule


def _check_rows(number: int, step: Traversal, program: Program) -> None:
    if step.map is not None and domains.map_target(step.map) != step.center:
        raise ValueError(f"k{number} walks {step.center}, where {step.map} does not lead")
    inner = None if step.map is None else domains.map_source(step.map)
    for sink in step.sinks:
        op = program[sink]
        along = op.kind not in SEGMENT or op.map == step.map
        if not along or op.type.domain not in (step.center, inner):
            raise ValueError(f"k{number} over {step.center} cannot hold {render_op(op)}")


def _check_sum(number: int, step: Gemm, program: Program) -> None:
    op, along = program[step.op], step.scatter
    added = [op] if op.kind == "sum" else [program[a] for a in op.args if op.kind == "add"]
    if not any(a.kind == "sum" and a.map == along for a in added):
        raise ValueError(f"k{number} adds up along {along}, which {render_op(op)} does not")


def _names(values: set[int]) -> str:
    return ", ".join(f"%{v}" for v in sorted(values))
