"""Which values are alive at each step of a schedule, in bytes, and the order with the lowest peak.

A value lives from the step that makes it to the last step that reads it. Where nothing reads an
operand afterwards, its memory becomes the result's: that of its rows a transposed product's, that
of either operand an elementwise result's, that of what products are added to their sum's. What a
run is given (features, weights, values kept by forward) is there throughout and is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dataeff.rgnn.ir import Op
from dataeff.rgnn.kernels_ir import Dense, Gemm, Schedule, Traversal, closure
from dataeff.rgnn.signatures import ALIASES, BINARY, UNARY
from dataeff.rgnn.view import View

ELEMENTWISE = (*UNARY, *BINARY)
# Orders kept at each length of the search: enough to keep a few large values apart.
BEAM = 48
# A step that makes less than this share of the largest value is no matter of order.
SMALL_SHARE = 0.02


@dataclass(frozen=True)
class Moment:
    """What is alive while a step runs: bytes of each value."""

    step: int
    alive: dict[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(self.alive.values())


class Footprints:
    """Bytes that each step of a schedule allocates, and what it lets go."""

    def __init__(self, schedule: Schedule, sizes: tuple[int, ...], item_size: int) -> None:
        self.schedule, self.sizes, self.item_size = schedule, sizes, item_size
        self.program = schedule.program
        steps = schedule.steps
        self.reads = [schedule.reads(step) for step in steps]
        self.makes = [makes(schedule, n) for n in range(len(steps))]
        self.reusable = [reusable(schedule, n) for n in range(len(steps))]
        self.readers: dict[int, set[int]] = {}
        for number, read in enumerate(self.reads):
            for value in read:
                self.readers.setdefault(value, set()).add(number)
        self.made_by = {v: n for n, made in enumerate(self.makes) for v in made}

    def nbytes(self, value: int) -> int:
        """Bytes of a value; none for one that shares the memory of another."""
        op = self.program[value]
        if op.kind == "prefix":
            return 0
        return View.rows_of(self.sizes, op.type.domain) * op.type.numel * self.item_size

    def over(self, step: int, done: Iterable[int]) -> int | None:
        """The value whose memory a step's result takes when the steps `done` have run before."""
        past = {*done, step}
        free = (v for v in self.reusable[step] if v in self.made_by and self.readers[v] <= past)
        return next(free, None)

    def allocates(self, step: int, done: Iterable[int]) -> int:
        """Bytes that a step takes when the steps `done` have run before it."""
        if self.over(step, done) is not None:
            return 0
        return sum(map(self.nbytes, self.makes[step]))

    def drops(self, step: int, done: Iterable[int]) -> list[int]:
        """Values made here that nothing reads after a step."""
        past = {*done, step}
        return [
            v
            for v in (*self.reads[step], *self.makes[step])
            if v in self.made_by
            and v not in self.program.outputs
            and self.readers.get(v, set()) <= past
        ]

    def needs(self, step: int) -> set[int]:
        """Steps that must run before a step."""
        return {self.made_by[v] for v in self.reads[step] if v in self.made_by} - {step}


def makes(schedule: Schedule, number: int) -> list[int]:
    """Values that a step puts into memory."""
    step = schedule.steps[number]
    return schedule.kept(number) if isinstance(step, Traversal) else [step.op]


def reusable(schedule: Schedule, number: int) -> list[int]:
    """The operands whose memory a step can give its result, those that it would rather first.

    A kernel made them, and no other value shares their memory: what a dense step returns may be a
    view of its operand. A padded value can only be one of a value that nothing else reads.
    """
    step = schedule.steps[number]
    if isinstance(step, Gemm):
        found = _rows_or_sum(schedule, step)
    elif isinstance(step, Dense):
        found = _summands(schedule, step)
    else:
        found = _elements(schedule, step, makes(schedule, number))
    program = schedule.program
    dense = [program[s.op] for s in schedule.steps if isinstance(s, Dense) and s != step]
    viewed = {a for op in dense if op.kind != "sum" for a in op.args}
    viewed |= {a for op in program.ops if op.kind in ALIASES for a in op.args}
    return [v for v in found if v in _own(schedule, dense) - viewed]


def _own(schedule: Schedule, dense: list[Op]) -> set[int]:
    """What kernels made, and what pads rows that a kernel made for nothing else."""
    steps = schedule.steps
    made = {v for n, s in enumerate(steps) if not isinstance(s, Dense) for v in makes(schedule, n)}
    read = [v for s in steps for v in schedule.reads(s)] + list(schedule.program.outputs)
    pads = (op for op in dense if op.kind == "pad")
    return made | {op.id for op in pads if op.args[0] in made and read.count(op.args[0]) == 1}


def _rows_or_sum(schedule: Schedule, step: Gemm) -> list[int]:
    """The rows of a square product, or what products are added to."""
    op = schedule.program[step.op]
    if step.scatter is not None:
        onto = schedule.onto(step)
        return [] if onto is None or schedule.program[onto].type != op.type else [onto]
    rows = schedule.program[step.rows]
    same = op.kind in ("linear", "linear_t") and op.type.numel == rows.type.numel
    fits = step.gather is None and same and op.type.domain == rows.type.domain
    return [step.rows] if fits else []


def _summands(schedule: Schedule, step: Dense) -> list[int]:
    """The operands of a sum that a product or a traversal made."""
    program = schedule.program
    op = program[step.op]
    if op.kind != "add" or any(program[a].type != op.type for a in op.args):
        return []
    return [v for v in op.args if v in schedule.stored]


def _elements(schedule: Schedule, step: Traversal, kept: list[int]) -> list[int]:
    """What a traversal that keeps one value reads only at the element that it writes."""
    if len(kept) != 1:
        return []
    program, (sink,) = schedule.program, kept
    if program[sink].type.domain != step.center:  # inner rows, which others may read before
        return []
    readers: dict[int, set[int]] = {}
    held = set(step.sinks).union(*(closure(program, schedule.stored, s) for s in step.sinks))
    for reader in held:
        for value in program[reader].args:
            readers.setdefault(value, set()).add(reader)

    def elementwise(value: int) -> bool:
        above = readers.get(value, set())
        alike = program[value].type == program[sink].type
        return alike and all(program[v].kind in ELEMENTWISE and elementwise(v) for v in above)

    return [v for v in sorted(readers) if v in schedule.stored and elementwise(v)]


def last_uses(schedule: Schedule) -> dict[int, int]:
    """The last step that reads a stored value; outputs are read afterwards."""
    last = {v: n for n, step in enumerate(schedule.steps) for v in schedule.reads(step)}
    return {v: n for v, n in last.items() if v not in schedule.program.outputs}


def overwritten(schedule: Schedule) -> dict[int, int]:
    """By step number, the operand whose memory becomes the result's.

    It is one that nothing reads any more.
    """
    last, found = last_uses(schedule), {}
    for number in range(len(schedule.steps)):
        free = (v for v in reusable(schedule, number) if last.get(v) == number)
        if (value := next(free, None)) is not None:
            found[number] = value
    return found


def passing(schedule: Schedule) -> dict[int, int]:
    """Values of kernels whose memory no result of a run can share, with the step that ends its use.

    A dense step may return a view of its operand, and a result in an operand's memory ends with it.
    """
    program, over = schedule.program, overwritten(schedule)
    until, kept = last_uses(schedule), set(program.outputs)
    own: set[int] = set()
    for number, step in reversed(list(enumerate(schedule.steps))):
        if not isinstance(step, Dense):
            own.update(makes(schedule, number))
            operands = [over[number]] if number in over else []
        else:
            operands = [] if program[step.op].kind == "sum" else list(program[step.op].args)
        for result, operand in ((r, o) for r in makes(schedule, number) for o in operands):
            if result in kept or result not in until:
                kept.add(operand)
            else:
                until[operand] = max(until.get(operand, number), until[result])
    return {v: n for v, n in until.items() if v in own - kept}


def moments(schedule: Schedule, sizes: tuple[int, ...], item_size: int) -> list[Moment]:
    """What is alive during each step."""
    prints = Footprints(schedule, sizes, item_size)
    found: list[Moment] = []
    alive: dict[int, int] = {}
    done: list[int] = []
    for number in range(len(schedule.steps)):
        over = prints.over(number, done)
        for value in prints.makes[number]:
            alive[value] = prints.nbytes(value) if over is None else 0
        found.append(Moment(number, dict(alive)))
        if over in alive:
            alive[prints.makes[number][0]] = alive[over]
        for value in prints.drops(number, done):
            alive.pop(value, None)
        done.append(number)
    return found


def peak(schedule: Schedule, sizes: tuple[int, ...], item_size: int) -> Moment | None:
    """The moment at which the most bytes are alive; None for a schedule without steps."""
    return max(moments(schedule, sizes, item_size), key=lambda m: m.nbytes, default=None)


def render_moments(schedule: Schedule, sizes: tuple[int, ...], item_size: int) -> str:
    """One line per step: bytes alive while it runs, and of which values."""
    lines = []
    for moment in moments(schedule, sizes, item_size):
        held = {v: n for v, n in moment.alive.items() if n}
        values = ", ".join(f"%{v}" for v in held) or "nothing"
        lines.append(f"k{moment.step}: {moment.nbytes} bytes: {values}")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Prefix:
    """The first steps of an order: their peak, and what is alive after them."""

    peak: int
    alive: int
    order: tuple[int, ...]

    @property
    def key(self) -> tuple[int, int, tuple[int, ...]]:
        return self.peak, self.alive, self.order


def reorder_steps(schedule: Schedule, sizes: tuple[int, ...]) -> Schedule:
    """The schedule with its steps in the order of the lowest peak found by a beam search.

    Where no order is better by a hundredth, the steps stay as they are.
    """
    item_size = 4  # of any dtype: peaks are held against one another
    prints = Footprints(schedule, sizes, item_size)
    before = peak(schedule, sizes, item_size)
    if before is None:
        return schedule
    needs = [prints.needs(n) for n in range(len(schedule.steps))]
    largest = max((prints.nbytes(v) for v in prints.made_by), default=0)
    beam = [_Prefix(0, 0, ())]
    for _ in schedule.steps:
        found: dict[frozenset[int], _Prefix] = {}
        for prefix in beam:
            for number in _next_steps(prefix.order, needs, prints, SMALL_SHARE * largest):
                longer = _append(prefix, number, prints)
                key = frozenset(longer.order)
                if key not in found or longer.key < found[key].key:
                    found[key] = longer
        beam = sorted(found.values(), key=lambda p: p.key)[:BEAM]
    best = beam[0]
    if best.peak > 0.99 * before.nbytes:
        return schedule
    steps = tuple(schedule.steps[n] for n in best.order)
    return Schedule(schedule.program, steps, schedule.stored)


def _next_steps(
    order: Sequence[int], needs: list[set[int]], prints: Footprints, small: float
) -> list[int]:
    """Steps that can come next; one alone where it takes next to nothing."""
    done = set(order)
    ready = [n for n, before in enumerate(needs) if n not in done and before <= done]
    for number in ready:
        if prints.allocates(number, done) <= small:
            return [number]
    return ready


def _append(prefix: _Prefix, number: int, prints: Footprints) -> _Prefix:
    during = prefix.alive + prints.allocates(number, prefix.order)
    freed = sum(prints.nbytes(v) for v in prints.drops(number, prefix.order))
    if (over := prints.over(number, prefix.order)) is not None:
        freed -= prints.nbytes(over)  # its memory goes on as the result's
    return _Prefix(max(prefix.peak, during), during - freed, (*prefix.order, number))
