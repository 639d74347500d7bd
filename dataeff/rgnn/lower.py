"""Lowering: which values are stored, and which kernel computes what.

Everything elementwise is computed where it is read. Stored are: operands and results of products,
reductions, outputs; values that are costly and are read through a gather (once per edge, though
they exist once per pair); and costly edge values that two kernels would otherwise both compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Op, Program
from dataeff.rgnn.kernels_ir import Dense, Gemm, Schedule, Step, Traversal
from dataeff.rgnn.signatures import SEGMENT

# A product with no more outputs per row than this is a few inner products: it is done in a
# traversal, where its operands are at hand, rather than as a matrix product.
SMALL_PRODUCT = 8
_COSTLY = (
    "exp",
    "log",
    "sqrt",
    "tanh",
    "sigmoid",
    "gelu",
    "gelu_grad",
    "reduce",
    "linear",
    "linear_t",
)


def lower(program: Program, dense: tuple[str, ...] = ()) -> Schedule:
    """Schedule a program.

    Args:
        program: what to schedule.
        dense: kinds of operations that the backend cannot do inside a traversal.

    Returns:
        Steps in an order in which each reads only what earlier ones stored.
    """
    stored = _stored(program, dense)
    steps = _Assignment(program, stored, dense).steps
    shared = _shared_between_kernels(program, stored, steps)
    if shared:
        stored |= shared
        steps = _Assignment(program, stored, dense).steps
    schedule = Schedule(program, tuple(steps), frozenset(stored))
    return Schedule(program, _let_products_overwrite(schedule), frozenset(stored))


def _let_products_overwrite(schedule: Schedule) -> tuple[Step, ...]:
    """Move transposed products behind the other readers of their rows, whose memory they reuse."""
    steps = list(schedule.steps)
    for step in schedule.steps:
        if not isinstance(step, Gemm) or schedule.program[step.op].kind != "linear_t":
            continue
        here = steps.index(step)
        rest = [schedule.reads(s) for s in steps[here + 1 :]]
        last = max((n for n, read in enumerate(rest) if step.rows in read), default=-1)
        if last >= 0 and not any(step.op in read for read in rest[: last + 1]):
            steps.insert(here + last + 1, steps.pop(here))
    return tuple(steps)


def category(program: Program, op: Op, dense: tuple[str, ...] = ()) -> str:
    """How an operation is carried out: input, inline, gemm, dense or segment."""
    if op.kind in ("input", "const", "degree"):
        return "input" if op.kind == "input" else "inline"
    if op.type.domain in domains.TYPE_DOMAINS and op.kind != "outer":
        return "dense"
    if op.kind in SEGMENT:
        return "segment"
    if op.kind == "pad" or (op.kind in dense and not _only_axes_of_one(program, op)):
        return "dense"
    if op.kind == "outer":
        return "gemm"
    if op.kind in ("linear", "linear_t"):
        narrow = op if op.kind == "linear" else program[op.args[0]]
        return "inline" if narrow.type.numel <= SMALL_PRODUCT else "gemm"
    return "inline"


def _only_axes_of_one(program: Program, op: Op) -> bool:
    """A reshape that inserts or drops axes of size 1."""
    shapes = [program[op.args[0]].type.shape, op.type.shape]
    return op.kind == "reshape" and len({tuple(n for n in s if n != 1) for s in shapes}) == 1


def _stored(program: Program, dense: tuple[str, ...]) -> set[int]:
    found = set(program.outputs)
    kinds = [category(program, op, dense) for op in program.ops]
    for op, kind in zip(program.ops, kinds, strict=True):
        if kind != "inline":
            found.add(op.id)
        if kind == "dense":
            found.update(a for a in op.args if program[a].kind != "const")
        elif kind == "gemm":
            found.add(gemm_rows(program, op)[0])
            found.add(op.args[1])
        elif op.kind in ("linear", "linear_t"):
            found.add(op.args[1])
    costly = _costly(program, found)
    for op in program.ops:
        if op.kind == "gather" and op.args[0] in costly:
            found.add(op.args[0])
    return found


def gemm_rows(program: Program, op: Op) -> tuple[int, str | None]:
    """The value whose rows a product reads, and the map it reads them through."""
    rows = program[op.args[0]]
    if rows.kind == "gather" and not rows.map.endswith(".one"):
        source = program[rows.args[0]]
        if source.kind == "prefix":  # the first rows of a node value are rows of that value
            source = program[source.args[0]]
        return source.id, rows.map
    return rows.id, None


def _costly(program: Program, stored: set[int]) -> set[int]:
    """Values not stored whose computation holds something costly."""
    found: set[int] = set()
    for op in program.ops:
        if op.id in stored:
            continue
        deep = op.kind in _COSTLY and (op.kind != "reduce" or program[op.args[0]].type.numel > 1)
        if deep or any(a in found for a in op.args):
            found.add(op.id)
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


def _shared_between_kernels(program: Program, stored: set[int], steps: list[Step]) -> set[int]:
    """Costly narrow values of edges that more than one kernel would compute."""
    costly = _costly(program, stored)
    count: dict[int, int] = {}
    for step in steps:
        if isinstance(step, Traversal):
            held: set[int] = set()
            for sink in step.sinks:
                held |= closure(program, stored, sink)
            for value in held:
                count[value] = count.get(value, 0) + 1
    shared = {
        v
        for v, n in count.items()
        if n > 1
        and v in costly
        and program[v].type.numel <= SMALL_PRODUCT
        and program[v].kind != "gather"
        and program[v].type.domain == "edge"
    }
    users = program.users()
    return {v for v in shared if any(u not in shared and count.get(u, 0) < 2 for u in users[v])}


class _Assignment:
    """Places stored values into kernels, first fit in program order."""

    def __init__(self, program: Program, stored: set[int], dense: tuple[str, ...]) -> None:
        self.program = program
        self.stored = stored
        self.steps: list[Step] = []
        self.step_of: dict[int, int] = {}
        for op in program.ops:
            if op.id not in stored:
                continue
            kind = category(program, op, dense)
            if kind == "input" or op.kind == "const":
                self.step_of[op.id] = -1
            elif kind == "dense":
                self._append(op.id, Dense(op.id))
            elif kind == "gemm":
                self._append(op.id, Gemm(op.id, *gemm_rows(program, op)))
            else:
                self._place(op)

    def _append(self, value: int, step: Step) -> None:
        self.step_of[value] = len(self.steps)
        self.steps.append(step)

    def _place(self, op: Op) -> None:
        center, along = self._shape(op)
        for number, step in enumerate(self.steps):
            if isinstance(step, Traversal) and self._fits(op, center, along, number, step):
                step.map = step.map or along
                step.sinks.append(op.id)
                self.step_of[op.id] = number
                return
        self._append(op.id, Traversal(center, along, [op.id]))

    def _shape(self, op: Op) -> tuple[str, str | None]:
        if op.kind in SEGMENT:
            return domains.map_target(op.map), op.map
        if op.type.domain == "edge":
            return "dst", "edge.dst"
        return op.type.domain, None

    def _fits(self, op: Op, center: str, along: str | None, number: int, step: Traversal) -> bool:
        inner_store = op.type.domain == "edge" and op.kind not in SEGMENT
        if inner_store:
            if step.map is None or domains.map_source(step.map) != "edge":
                return False
            along = step.map
        elif step.center != center or (None not in (step.map, along) and step.map != along):
            return False
        for value, local in self._reads(op, step.map or along, inner_store):
            made = self.step_of[value]
            if made > number or (made == number and not local):
                return False
        return True

    def _reads(self, op: Op, along: str | None, inner: bool) -> Iterator[tuple[int, bool]]:
        """Stored values that `op` reads in a kernel along `along`, and whether at its own row."""
        level = "inner" if inner or op.kind in SEGMENT else "outer"
        stack = [(a, level) for a in op.args]
        while stack:
            value, level = stack.pop()
            if value in self.stored:
                yield value, level != "remote"
                continue
            v = self.program[value]
            if v.kind == "gather":
                own = level == "inner" and v.map == along
                stack.append((v.args[0], "outer" if own else "remote"))
            elif v.kind in ("linear", "linear_t"):
                stack += [(v.args[0], level), (v.args[1], "remote")]
            else:
                stack += [(a, "remote" if v.kind == "prefix" else level) for a in v.args]
