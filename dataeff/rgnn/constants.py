"""What layers make of their parameters, kept while those hold the same bytes.

Inference runs a layer on the same weights again and again, and each call would stack them by type
and multiply weights with weights anew: HGT with 90 relations of 64 x 64 does so for as long as its
products of 8,000 nodes take. Version counters do not tell of writes through `.data` or by another
process, so the bytes themselves are compared with a copy: 3 MB in 0.2 ms, on one core.

Nothing is kept of calls with gradients, in a traced or transformed call, for tensors that are not
plain ones on the CPU, and where comparing takes longer than what it saves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from dataeff import _core
from dataeff.memory.scratch import when_idle_is_cleared
from dataeff.rgnn.cost import step_cost
from dataeff.rgnn.domains import TYPE_DOMAINS
from dataeff.rgnn.ir import Op
from dataeff.rgnn.kernels_ir import Dense, Schedule
from dataeff.rgnn.text import render_op
from dataeff.rgnn.view import View
from dataeff.rgnn.watched import is_watched

Arguments = tuple[Tensor | None, ...]

# Calls that keep nothing after copies that nothing was found to equal: twice as many each time.
MOST_SKIPPED = 63
# A byte is compared in the time of about so many flops; few bytes always pay, by what is stacked.
FLOPS_PER_BYTE = 16
FEW_NBYTES = 1 << 20
KEPT_PROGRAMS = 2  # of one layer: two kinds of graphs may have it compiled in two ways


class Group:
    """Arguments that nobody writes to, and what programs computed of them alone."""

    def __init__(self) -> None:
        self.flops: int | None = None  # that are saved, when a program has run
        self._values: dict[object, Mapping[int, Tensor]] = {}

    def find(self, key: object) -> Mapping[int, Tensor] | None:
        """What `keep` was given."""
        return self._values.get(key)

    def keep(self, key: object, values: Mapping[int, Tensor], flops: int) -> None:
        """Keep values of a program, found again by all that they depend on."""
        while len(self._values) >= KEPT_PROGRAMS:
            self._values.pop(next(iter(self._values)), None)
        self._values[key] = values
        self.flops = flops


class ConstantSteps:
    """The steps of a schedule that work on parameters alone.

    Attributes:
        numbers: which steps.
        read: those of them whose values other steps read.
    """

    def __init__(self, schedule: Schedule) -> None:
        program, self.schedule = schedule.program, schedule
        given = {op.id for op in program.ops if op.kind in ("input", "const")}
        known = {v for v in given if program[v].type.domain in TYPE_DOMAINS}
        made: dict[int, Op] = {}
        for number, step in enumerate(schedule.steps):
            if isinstance(step, Dense) and step.op not in program.outputs:
                op = program[step.op]
                if op.type.domain in TYPE_DOMAINS and known.issuperset(op.args):
                    known.add(op.id)
                    made[number] = op
        self.numbers = frozenset(made)
        used = given & {a for op in made.values() for a in op.args}
        self._names = [str(program[v].attrs[0]) for v in used if program[v].kind == "input"]
        others = [schedule.reads(s) for n, s in enumerate(schedule.steps) if n not in made]
        read = set().union(*others)
        self.read = frozenset(n for n, op in made.items() if op.id in read)
        self._text = "\n".join(map(render_op, made.values()))

    def group(self, inputs: Mapping[str, Tensor]) -> Group | None:
        """The group of all parameters that these steps read, if they are of one."""
        found = {getattr(inputs[name], "constant_group", None) for name in self._names}
        return found.pop() if len(found) == 1 else None

    def key(self, view: View) -> object:
        """What their values depend on besides the parameters."""
        layout = view.graph.layout
        types = None if layout is None else (layout.node_types, layout.edge_types)
        return self._text, view.num_rows("etype"), view.num_rows("ntype"), types

    def flops(self, view: View) -> int:
        """What they compute."""
        return sum(step_cost(self.schedule, n, view.sizes, 1).flops for n in self.numbers)


class Constants:
    """The arguments that one module makes of its parameters."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._unequal = 0  # copies in a row that no parameters were found to equal
        self._skipped = 0  # calls to come that keep nothing

    def clear(self) -> None:
        """Let go what is kept."""
        self._kept = None

    def of(self, parameters: Sequence[Tensor], make: Callable[[], Arguments]) -> Arguments:
        """`make()`, or what it returned when the parameters held the same bytes.

        Args:
            parameters: all that `make` reads.
            make: stacks, joins, transposes; what it returns shares memory with nothing that is
                written to but the parameters.
        """
        kept = self._kept
        if not _bytes_tell_all(parameters):
            self._kept = None
            return make()
        if kept is not None:
            if kept.holds(parameters):
                self._unequal = 0
                if not kept.pays:
                    self._kept, self._skipped = None, MOST_SKIPPED
                return kept.arguments
            self._kept = None
            if self._unequal:
                self._skipped = min(2**self._unequal - 1, MOST_SKIPPED)
        if self._skipped:
            self._skipped -= 1
            return make()
        self._unequal += 1
        self._kept = kept = _Kept(parameters, make)
        return kept.arguments


class _Kept:
    """A copy of parameters, and the arguments made of them."""

    def __init__(self, parameters: Sequence[Tensor], make: Callable[[], Arguments]) -> None:
        self._places = _places(parameters)
        sizes = [p.nbytes for p in parameters]
        self._copy = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        first = self._copy.data_ptr()
        offsets = accumulate(sizes, initial=first)
        rows = [(p.data_ptr(), at, n) for p, at, n in zip(parameters, offsets, sizes, strict=False)]
        self._table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        # Before anything is made: what another thread writes meanwhile is not taken for the same.
        _core.copy_bytes(*self._parts())
        self.group = Group()
        self.arguments = tuple(None if a is None else self._argument(a) for a in make())

    def _argument(self, made: Tensor) -> Tensor:
        found = made.detach().contiguous()  # an object of its own, also of a parameter itself
        found.constant_group = self.group  # type: ignore[attr-defined]
        return found

    def _parts(self) -> tuple[int, int, int]:
        return self._table.data_ptr(), self._table.shape[0], torch.get_num_threads()

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the parameters are where they were, as they were."""
        return self._places == _places(parameters) and _core.same_bytes(*self._parts())

    @property
    def pays(self) -> bool:
        """Whether comparing takes less time than what was found to be saved."""
        nbytes, flops = self._copy.numel(), self.group.flops
        return nbytes <= FEW_NBYTES or flops is None or flops >= FLOPS_PER_BYTE * nbytes


def _places(tensors: Sequence[Tensor]) -> list[object]:
    return [(t.data_ptr(), t.shape, t.dtype) for t in tensors]


def _bytes_tell_all(tensors: Sequence[Tensor]) -> bool:
    """Whether what a call makes of these tensors depends on their bytes alone."""
    if is_watched() or torch.is_autocast_enabled("cpu"):
        return False
    return all(
        type(t) in (Tensor, Parameter)
        and t.is_cpu
        and t.dtype in (torch.float32, torch.float64)
        and t.is_contiguous()
        for t in tensors
    )


# Beside the modules and not in them: copies and pickles of a module hold none of it.
_of_modules: weakref.WeakKeyDictionary[Module, Constants] = weakref.WeakKeyDictionary()


def constants_of(module: Module) -> Constants:
    """What is kept for a module, as long as there is that module."""
    return _of_modules.setdefault(module, Constants())


@when_idle_is_cleared
def clear_constants() -> None:
    """Let go what is kept for any module."""
    for constants in list(_of_modules.values()):
        constants.clear()
