"""Plans: what one call signature of a layer compiles to, found again by an immutable request."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dataeff.rgnn.autodiff import differentiate, gradient_input
from dataeff.rgnn.backend import Runner, choose
from dataeff.rgnn.ir import Program
from dataeff.rgnn.passes.dce import eliminate_dead_code
from dataeff.rgnn.passes.narrow import narrow
from dataeff.rgnn.passes.pipeline import OPTIONAL, optimise, optimise_joint, rows_of
from dataeff.rgnn.profile import NUM_COUNTS, counts_of, nearby
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.split import NUM_TOLD, Halves, output_input, split
from dataeff.rgnn.step_memory import MOST_SHARE, is_large, share_of_step
from dataeff.rgnn.text import render
from dataeff.rgnn.tracer import RowCounts
from dataeff.rgnn.view import View

if TYPE_CHECKING:
    from dataeff.rgnn.layer import Layer

LAYERS: WeakValueDictionary[int, Layer] = WeakValueDictionary()  # found by a call's number
NARROWER = (2, 4)  # parts of the columns of wide products, until a step takes little enough memory


@dataclass(frozen=True)
class Request:
    """Everything a plan depends on."""

    layer_id: int
    spec: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: str
    sizes: tuple[int, ...]
    wanted: int

    @classmethod
    def of(
        cls, layer_id: int, spec: str, inputs: Sequence[Tensor], sizes: Sequence[int], wanted: int
    ) -> Request:
        """The request that an operator call stands for."""
        return cls(
            layer_id,
            spec,
            tuple(tuple(int(n) for n in t.shape) for t in inputs),
            inputs[0].dtype,
            inputs[0].device.type,
            tuple(int(s) for s in sizes),
            wanted,
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tensor arguments."""
        names: tuple[str, ...] = literal_eval(self.spec)[0]
        return names

    @property
    def disabled(self) -> frozenset[str]:
        """Optional passes that are left out."""
        parts = (*literal_eval(self.spec), (), None, False)
        # Weights of node types and of relations are only multiplied where each relation has one
        # node type at either end.
        return frozenset(parts[2] if parts[4] else (*parts[2], "fold_types"))

    @property
    def choice(self) -> Choice:
        """What tuning chose, without the passes, which are in `disabled`."""
        parts = literal_eval(self.spec)
        return Choice.of((), parts[5]) if len(parts) > 5 and parts[5] else Choice()

    @property
    def statics(self) -> dict[str, Any]:
        """Constant arguments."""
        return dict(literal_eval(self.spec)[1])

    @property
    def profile(self) -> str | None:
        """The size profile that `torch.compile` fixed, if it did."""
        profile: str | None = (*literal_eval(self.spec), None, None)[3]
        return profile


# Passes that calls made now leave out, in all threads: torch.compile traces a plain global, and not
# a ContextVar. They travel in the call's spec, so that backward finds the plan of its forward.
_disabled: tuple[str, ...] = ()


@contextmanager
def disabled_passes(*names: str) -> Iterator[None]:
    """Layers called meanwhile are compiled without these passes, to see what they are worth.

    Raises:
        ValueError: a name that is not in `OPTIONAL`.
    """
    global _disabled
    if unknown := set(names) - set(OPTIONAL):
        raise ValueError(f"no pass {sorted(unknown)} can be left out; these can: {OPTIONAL}")
    before, _disabled = _disabled, tuple(sorted(names))
    try:
        yield
    finally:
        _disabled = before


def spec_of(
    names: Sequence[str],
    statics: tuple[tuple[str, Any], ...],
    profile: str | None = None,
    typed: bool = False,
    choice: Choice | None = None,
    code: str | None = None,
) -> str:
    """The text that stands for a call's tensor names, constants, disabled passes and profile.

    `typed` says that the graph was made of edges by type; `choice` is what tuning chose; `code` is
    the digest of the layer's code, by which programs on disk are told apart.
    """
    if choice is None and code is None:
        return repr((tuple(names), statics, _disabled, profile, typed))
    choice = choice or Choice()
    disabled = tuple(sorted({*_disabled, *choice.disabled}))
    return repr((tuple(names), statics, disabled, profile, typed, choice.sizes, code))


class Compiled:
    """What a traced program becomes on one kind of device, for graphs of about one size.

    Attributes:
        stages: (pass name, program after it) pairs, forward and joint.
        forward, backward: what runs.
        wanted: the arguments whose gradients backward returns, in the order of its outputs.
        reads_outputs: a bit for each of the first `NUM_TOLD` outputs that backward reads.
        sizes: rows of each domain that the passes decided by.
    """

    def __init__(
        self,
        traced: Program,
        sizes: tuple[int, ...],
        wanted: Sequence[str],
        dtype: torch.dtype,
        device: str,
        disabled: frozenset[str] = frozenset(),
        backend: str | None = None,
        choice: Choice | None = None,
    ) -> None:
        self.sizes = sizes
        self.stages: list[tuple[str, Program]] = [("traced", traced)]
        program = optimise(traced, sizes, self.stages, disabled)
        used = [str(op.attrs[0]) for op in program.inputs]
        self.wanted = [name for name in used if name in wanted]
        grads = [name for name in wanted if name in used]
        self._how = (dtype, device, backend, choice, sizes, disabled)
        found = self._halves(program, grads, sizes, disabled)
        for parts in NARROWER if "narrow" not in disabled else ():
            if found.share <= MOST_SHARE:
                break
            narrower = eliminate_dead_code(narrow(program, parts))
            if narrower == program:
                break
            other = self._halves(narrower, grads, sizes, disabled, ("narrow", narrower))
            found = min(found, other, key=lambda f: f.share)
        self.stages += found.stages
        halves = found.halves
        self.num_outputs = halves.num_outputs
        self.forward, self.backward = halves.forward, halves.backward
        read = {str(op.attrs[0]) for op in halves.backward.inputs} if halves.backward else set()
        self.reads_outputs = sum(
            1 << k for k in range(halves.num_outputs)[:NUM_TOLD] if output_input(k) in read
        )
        self.forward_runner, self.backward_runner = found.runners

    def _halves(
        self,
        program: Program,
        grads: Sequence[str],
        sizes: tuple[int, ...],
        disabled: frozenset[str],
        *stages: tuple[str, Program],
    ) -> _Step:
        """A program with its gradients, cut in two and scheduled."""
        joint, recorded = program, list(stages)
        if grads:
            joint = differentiate(program, grads)
            recorded.append(("differentiate", joint))
            joint = optimise_joint(joint, sizes, recorded, disabled)
        weights = (self._how[2] or choose(self._how[1])) == "cpp"
        halves = split(joint, len(program.outputs), rows_of(sizes), weights=weights)
        forward = Runner(halves.forward, *self._how)
        backward = Runner(halves.backward, *self._how) if halves.backward else None
        return _Step(
            halves, (forward, backward), recorded, _share(halves, forward, backward, sizes)
        )


@dataclass(frozen=True)
class _Step:
    """One way to carry out a training step, and the memory it takes over that of its tensors."""

    halves: Halves
    runners: tuple[Runner, Runner | None]
    stages: list[tuple[str, Program]]
    share: float


def _share(
    halves: Halves, forward: Runner, backward: Runner | None, sizes: tuple[int, ...]
) -> float:
    """The share of a step on the CPU that is large enough to ask; else none."""
    if forward.name != "cpp" or backward is None:
        return 0.0
    schedules, item_size = (forward.schedule, backward.schedule), forward.dtype.itemsize
    if schedules[0] is None or schedules[1] is None:
        return 0.0
    if not any(is_large(s, sizes, item_size) for s in schedules if s is not None):
        return 0.0
    return share_of_step(halves, schedules[0], schedules[1], sizes, item_size)


_WATCHING: ContextVar[list[Plan] | None] = ContextVar("plans run", default=None)


@contextmanager
def watched_plans() -> Iterator[list[Plan]]:
    """Collects the plans that run forward in this context, in order."""
    found: list[Plan] = []
    token = _WATCHING.set(found)
    try:
        yield found
    finally:
        _WATCHING.reset(token)


class Plan:
    """One call signature of a layer on graphs of exact sizes, ready to run.

    Attributes:
        traced: the program as the layer function wrote it.
        sizes: rows of each domain, with as many types as the layer's parameters have.
        compiled: what it became; shared by all graphs of about this size.
    """

    def __init__(
        self,
        request: Request,
        disabled: frozenset[str] = frozenset(),
        backend: str | None = None,
    ) -> None:
        self.request = request
        disabled |= request.disabled
        layer = LAYERS.get(request.layer_id)
        if layer is None:
            raise RuntimeError(
                "the layer of this call is gone, with the model or function that made it: keep"
                " that, or make the layer in a module, while what was exported from it runs"
            )
        names, node_counts = request.names, request.sizes
        rows = RowCounts(*node_counts[:3], *node_counts[5:])
        shapes = dict(zip(names, request.shapes, strict=True))
        self.traced = layer.trace(shapes, request.statics, rows)
        self.sizes = (*node_counts[:5], *_type_counts(layer.name, self.traced, shapes, node_counts))
        self.wanted = [n for i, n in enumerate(names) if request.wanted >> i & 1]
        self.compiled = _compiled_for(self, disabled, backend or choose(request.device))

    def run_forward(
        self, view: View, inputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the values that backward needs besides inputs and outputs."""
        if (watching := _WATCHING.get()) is not None:
            watching.append(self)
        named = dict(zip(self.request.names, inputs, strict=True))
        values = self.compiled.forward_runner(view, named)
        return values[: self.compiled.num_outputs], values[self.compiled.num_outputs :]

    def run_backward(
        self,
        view: View,
        grads: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor | None],
        saved: Sequence[Tensor],
    ) -> list[Tensor]:
        """Gradients of the wanted inputs, in argument order.

        Args:
            view: the graph.
            grads: of the outputs; None stands for zeros.
            inputs: as forward had them.
            outputs: of forward; None for those that backward does not read.
            saved: what else forward returned.
        """
        run = self.compiled.backward_runner
        named = dict(zip(self.request.names, inputs, strict=True))
        if run is None:  # no wanted argument takes part
            return [torch.zeros_like(named[name]) for name in self.wanted]
        given = dict(named)
        for k, grad in enumerate(grads):
            given[gradient_input(k)] = self._zeros(k, view, inputs[0]) if grad is None else grad
        given |= {output_input(k): v for k, v in enumerate(outputs) if v is not None}
        given |= {f"saved:{k}": v for k, v in enumerate(saved)}
        found = dict(zip(self.compiled.wanted, run(view, given), strict=True))
        return [found[n] if n in found else torch.zeros_like(named[n]) for n in self.wanted]

    def _zeros(self, output: int, view: View, like: Tensor) -> Tensor:
        kind = self.traced[self.traced.outputs[output]].type
        rows = () if kind.domain == "one" else (view.num_rows(kind.domain),)
        return like.new_zeros((*rows, *kind.shape))


def _type_counts(
    layer: str, program: Program, shapes: dict[str, tuple[int, ...]], sizes: tuple[int, ...]
) -> tuple[int, int]:
    """Rows of the relation and node type domains: those of the layer's parameters."""
    counts = {"etype": sizes[5], "ntype": sizes[6]}
    for domain in counts:
        found = {
            str(op.attrs[0]): shapes[str(op.attrs[0])][0]
            for op in program.inputs
            if op.type.domain == domain
        }
        if len(set(found.values())) > 1:
            raise ValueError(f"{layer}: parameters picked by {domain} differ in rows: {found}")
        counts[domain] = next(iter(found.values()), counts[domain])
    return counts["etype"], counts["ntype"]


# Sampled blocks differ in size from step to step. Tracing one takes well under a millisecond;
# passes, lowering and finding the kernels take many, so that their results are shared.
_COMPILED: dict[tuple[Any, ...], Compiled] = {}
KEPT_COMPILED = 256  # those made last


def _compiled_for(plan: Plan, disabled: frozenset[str], backend: str) -> Compiled:
    # Compiled for a size that depends on nothing but this one, not for the first that came: the
    # same call gives the same bits in every process.
    request = plan.request
    counts = tuple(map(nearby, plan.sizes[:NUM_COUNTS]))
    if request.profile is not None:
        counts = counts_of(request.profile)
    sizes = (*counts, *plan.sizes[NUM_COUNTS:])
    kind = (tuple(plan.wanted), request.dtype, request.device, disabled, backend, request.choice)
    key = (render(plan.traced), sizes, *kind)
    if key not in _COMPILED:
        if len(_COMPILED) >= KEPT_COMPILED:
            _COMPILED.pop(next(iter(_COMPILED)), None)
        _COMPILED[key] = Compiled(plan.traced, sizes, *kind)
    return _COMPILED[key]


def plan_for(request: Request) -> Plan:
    """The plan of a request on the backend chosen now, made at its first use."""
    return _plan_for(request, choose(request.device))


@lru_cache(maxsize=256)
def _plan_for(request: Request, backend: str) -> Plan:
    return Plan(request, backend=backend)
