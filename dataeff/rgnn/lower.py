"""Lowering: which values are stored, and which kernel computes what.

Everything elementwise is computed where it is read. Stored are: operands and results of products,
reductions, outputs; values that are costly and are read through a gather (once per edge, though
they exist once per pair); and costly edge values that two kernels would otherwise both compute.

Rows of pairs and of edges outnumber nodes, so a wide value of theirs is most of what a step takes:
a kernel that could do without holding a second one is kept apart, products of pairs are added up at
their node as they are made, and given the rows of each domain the steps are put in the order of the
lowest peak.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from heapq import heapify, heappop, heappush

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Builder, Op, Program
from dataeff.rgnn.kernels_ir import (
    Dense,
    Gemm,
    Schedule,
    Step,
    Traversal,
    closure,
    summands,
    verify_schedule,
)
from dataeff.rgnn.memory_plan import reorder_steps
from dataeff.rgnn.signatures import SEGMENT

# A product with no more outputs per row than this is a few inner products: it is done in a
# traversal, where its operands are at hand, rather than as a matrix product.
SMALL_PRODUCT = 8
# Stored values of edges that a kernel reads, rather than one that another kernel makes of them.
MOST_READ = 2
# Domains with more rows than there are nodes.
MANY_ROWS = ("src_pair", "dst_pair", "edge", "given")
# Values that are stored where they are read through a gather.
COSTLY = (
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


def lower(
    program: Program,
    dense: tuple[str, ...] = (),
    sizes: tuple[int, ...] | None = None,
    *,
    fuse: bool = True,
    scatter: bool = False,
) -> Schedule:
    """Schedule a program.

    Args:
        program: what to schedule.
        dense: kinds of operations that the backend cannot do inside a traversal.
        sizes: rows of each domain, by which steps are put in the order of the lowest peak.
        fuse: let traversals store several values; else each has one of its own.
        scatter: let products of pairs be added up where they are made, as the backend then must.

    Returns:
        Steps in an order in which each reads only what earlier ones stored.
    """
    stored = _stored(program, dense)
    sums = _added_up(program, stored) if scatter and fuse else {}
    steps = _Assignment(program, stored, dense, fuse, sums).steps
    shared = _shared_between_kernels(program, stored, steps)
    if shared:
        stored |= shared
        steps = _Assignment(program, stored, dense, fuse, sums).steps
    schedule = Schedule(program, tuple(steps), frozenset(stored))
    schedule = Schedule(program, _let_products_overwrite(schedule), frozenset(stored))
    return verify_schedule(schedule if sizes is None else reorder_steps(schedule, sizes))


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


def category(program: Program | Builder, op: Op, dense: tuple[str, ...] = ()) -> str:
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


def _only_axes_of_one(program: Program | Builder, op: Op) -> bool:
    """A reshape that inserts or drops axes of size 1."""
    shapes = [program[op.args[0]].type.shape, op.type.shape]
    return op.kind == "reshape" and len({tuple(n for n in s if n != 1) for s in shapes}) == 1


def _stored(program: Program, dense: tuple[str, ...]) -> set[int]:
    # A constant is written where it is read, and as an output made at the end.
    found = {o for o in program.outputs if program[o].kind != "const"}
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
    # The first rows of a value are a view of it: where they are stored, it is.
    found.update(a for v in sorted(found) if program[v].kind == "prefix" for a in program[v].args)
    return found | _partial_products(program, found)


def _partial_products(program: Program, stored: set[int]) -> set[int]:
    """Inner products that are added to those of other wide rows: one wide value at a time."""
    found: set[int] = set()
    for op in program.ops:
        if op.kind != "add" or op.type.domain != "edge" or op.type.numel > SMALL_PRODUCT:
            continue
        reads = {a: _wide_reads(program, stored, a) for a in op.args}
        together = set().union(*reads.values())
        found |= {
            a for a, r in reads.items() if program[a].kind == "reduce" and r and r != together
        }
    return found


def _wide_reads(program: Program, stored: set[int], value: int) -> set[int]:
    if value in stored:
        return set()
    return {v for v in _stored_reads(program, stored, value) if is_wide(program[v])}


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
        deep = op.kind in COSTLY and (op.kind != "reduce" or program[op.args[0]].type.numel > 1)
        if deep or any(a in found for a in op.args):
            found.add(op.id)
    return found


def is_wide(op: Op) -> bool:
    """Whether a value has rows wider than a few elements, and more of them than nodes."""
    return op.type.domain in MANY_ROWS and op.type.numel > SMALL_PRODUCT


def _shared_between_kernels(program: Program, stored: set[int], steps: list[Step]) -> set[int]:
    """Narrow values of edges, costly or made of many, that more than one kernel would compute."""
    costly = _costly(program, stored) | _made_of_many(program, stored)
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


def _made_of_many(program: Program, stored: Set[int]) -> set[int]:
    """Values of edges that are computed from several stored ones: to read one takes less."""
    reads: dict[int, set[int]] = {}
    for op in program.ops:
        below = [{a} if a in stored else reads.get(a, set()) for a in op.args]
        reads[op.id] = {v for v in set().union(*below) if program[v].type.domain == "edge"}
    return {v for v, read in reads.items() if v not in stored and len(read) > MOST_READ}


def _added_up(program: Program, stored: set[int]) -> dict[int, Gemm]:
    """Products of pairs that only a sum at their node reads: the step of each sum.

    Where the sum is only added to another stored value, to that value. What is never stored then is
    taken out of `stored`.

    Pairs stand relation by relation, and in each of them every node once and in order: that is what
    lets nodes be shared out to threads.
    """
    users, found = program.users(), {}
    for op in program.ops:
        if op.kind != "sum" or op.map not in ("src_pair.src", "dst_pair.dst"):
            continue
        product = program[op.args[0]]
        typed = product.kind in ("linear", "linear_t") and product.id in stored
        alone = users[product.id] == [op.id] and product.id not in program.outputs
        if not typed or not alone or program[product.args[1]].type.domain != "etype":
            continue
        stored.discard(product.id)
        step = Gemm(op.id, *gemm_rows(program, product), op.map)
        if (total := _only_added(program, op, users, stored)) is not None:
            stored.discard(op.id)
            stored.add(total)
            step = replace(step, op=total)
        found[step.op] = step
    return found


def _only_added(program: Program, op: Op, users: list[list[int]], stored: Set[int]) -> int | None:
    """The sum of a value with a stored one of its type, if nothing else reads it."""
    total = program[users[op.id][0]] if len(users[op.id]) == 1 else None
    if op.id in program.outputs or total is None or total.kind != "add":
        return None
    other, added = summands(program, total.id, op.map)
    fits = added == op.id != other and other in stored and program[other].type == op.type
    return total.id if fits else None


def _stored_reads(program: Program, stored: Set[int], value: int) -> set[int]:
    """The stored values that a stored one is computed from."""
    inside = closure(program, stored, value)
    return {a for v in (value, *inside) for a in program[v].args if a in stored}


class _Assignment:
    """Places stored values into kernels, first fit in program order."""

    def __init__(
        self,
        program: Program,
        stored: set[int],
        dense: tuple[str, ...],
        fuse: bool,
        sums: Mapping[int, Gemm],
    ) -> None:
        self.program = program
        self.fuse = fuse
        self.stored = stored
        self.steps: list[Step] = []
        self.step_of: dict[int, int] = {}
        self.reads = {v: _stored_reads(program, stored, v) for v in stored}
        self.readers: dict[int, set[int]] = {v: set() for v in stored}
        for reader, read in self.reads.items():
            for value in read:
                self.readers[value].add(reader)
        for op in self._wide_last():
            kind = category(program, op, dense)
            if op.id in sums:
                self._append(op.id, sums[op.id])
            elif kind == "input" or op.kind == "const":
                self.step_of[op.id] = -1
            elif kind == "dense" or op.kind == "prefix":
                self._append(op.id, Dense(op.id))
            elif kind == "gemm":
                self._append(op.id, Gemm(op.id, *gemm_rows(program, op)))
            else:
                self._place(op)

    def _wide_last(self) -> Iterator[Op]:
        """Stored values, each after what it reads, wide ones no sooner than they have to be."""
        waiting = {v: len(read) for v, read in self.reads.items()}
        ready = [(is_wide(self.program[v]), v) for v, count in waiting.items() if not count]
        heapify(ready)
        while ready:
            _, value = heappop(ready)
            yield self.program[value]
            for reader in self.readers[value]:
                waiting[reader] -= 1
                if not waiting[reader]:
                    heappush(ready, (is_wide(self.program[reader]), reader))

    def _append(self, value: int, step: Step) -> None:
        self.step_of[value] = len(self.steps)
        self.steps.append(step)

    def _place(self, op: Op) -> None:
        center, along = self._shape(op)
        for number, step in enumerate(self.steps if self.fuse else ()):
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
        for value, local in self._levels(op, step.map or along, inner_store):
            made = self.step_of[value]
            if made > number or (made == number and not local):
                return False
        return self._holds_one_wide_value(op, step)

    def _holds_one_wide_value(self, op: Op, step: Traversal) -> bool:
        """Whether a kernel that also makes `op` needs no more wide values at once for it."""
        read = self._wide_reads(op) - set(step.sinks)
        others = {v for s in step.sinks for v in self._wide_reads(self.program[s])}
        if read and others and not (read <= others or others <= read):
            return False
        makes = {*step.sinks, op.id}
        if not any(is_wide(self.program[v]) for v in makes):
            return True
        if any(is_wide(self.program[v]) for v in self.reads[op.id] & set(step.sinks)):
            return True  # it is computed from the row at hand
        kept = {v for v in makes if not self.readers[v] <= makes or v in self.program.outputs}
        return len(kept) <= 1

    def _wide_reads(self, op: Op) -> set[int]:
        return {v for v in self.reads[op.id] if is_wide(self.program[v])}

    def _levels(self, op: Op, along: str | None, inner: bool) -> Iterator[tuple[int, bool]]:
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
