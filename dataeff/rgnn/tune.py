"""`rgnn.tune`: choose what the compiler does for a layer on graphs like one, and remember it.

A cost model ranks the candidates by the bytes and flops of their kernels; the best few are run and
timed. The result is kept on disk by device, program and graph statistics, so the next process that
asks for it runs nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataeff._version import __version__
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.cost import step_cost
from dataeff.rgnn.layer import Layer, choice_key
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.profile import statistics_of
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.text import render
from dataeff.rgnn.toolchain import cache_dir, cpu_name
from dataeff.rgnn.view import View

if TYPE_CHECKING:
    from dataeff.rgnn.graph import Graph

PASSES = ("compact", "reorder", "aggregate_first", "spread")
BLOCK_ELEMENTS = (1024, 2048, 4096)
PARTS_PER_THREAD = (4, 16, 64)
# Rates that only rank candidates: bytes and flops a second, and seconds to start a kernel.
RATES = {"cpu": (10e9, 50e9, 2e-6), "cuda": (2e12, 30e12, 5e-6)}
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 30, 0.25


@dataclass(frozen=True)
class Candidate:
    """One choice: what the cost model expects of a training step, and what was measured."""

    choice: Choice
    modelled_s: float
    measured_s: float | None = None


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes:
        choice: now used by the layer on graphs of these statistics.
        candidates: all that were ranked, the chosen one first.
        cached: found on disk; nothing was run.
        path: the file that keeps it.
    """

    choice: Choice
    candidates: tuple[Candidate, ...]
    cached: bool
    path: Path


def tune(
    layer: Layer,
    graph: Graph,
    *args: Any,
    measure: bool = True,
    candidates: int = 4,
    progress: bool = True,
    refresh: bool = False,
    **kwargs: Any,
) -> Tuning:
    """Choose passes and sizes for a layer on graphs of this one's statistics.

    What is chosen holds for later calls of `layer` with this dtype, on this kind of device, on
    graphs with as many relations whose row counts round to the same sizes. Results do not change
    but in their rounding. Interrupting it leaves the layer and the files as they were.

    Args:
        layer: a function decorated with `rgnn.layer`.
        graph: a graph like those it will run on.
        *args: the layer's arguments.
        measure: run the best candidates, forward and backward; else the cost model decides alone.
        candidates: how many sets of passes to run, and then how many sizes at most.
        progress: show a bar where the terminal can (needs `rich`).
        refresh: choose anew though a result is kept.
        **kwargs: more arguments of the layer.

    Raises:
        ValueError: `candidates` is less than one.
    """
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; it must be at least 1")
    search = _Search(layer, graph, args, kwargs)
    path = cache_dir().parent / "tune" / f"{search.key}.json"
    found = None if refresh else _read(path, measure)
    if found is None:
        ranked = search.rank()
        if measure:
            ranked = search.measure(ranked[:candidates], progress) + ranked[candidates:]
        found = Tuning(ranked[0].choice, tuple(ranked), False, path)
        _write(found, measure)
    first = search.inputs[0]
    statistic = statistics_of(graph.sizes)
    for name in {statistic, graph.prepare().profile}:
        layer.choices[choice_key(graph, name, first)] = found.choice
    return found


class _Search:
    """One call of a layer, compiled as each candidate says."""

    def __init__(
        self, layer: Layer, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        tensors, self.statics = layer.bind(graph, args, kwargs)
        self.layer, self.graph = layer, graph
        self.names, self.inputs = tuple(tensors), [t.detach() for t in tensors.values()]
        plain = self.plan(Choice())
        self.backend = plain.compiled.forward_runner.name
        self.dtype, self.device = self.inputs[0].dtype, self.inputs[0].device
        what = (
            __version__,
            _device_name(self.device),
            self.backend,
            render(plain.traced),
            repr(choice_key(graph, statistics_of(graph.sizes), self.inputs[0])),
        )
        self.key = hashlib.sha256("\0".join(what).encode()).hexdigest()[:24]

    def plan(self, choice: Choice) -> Plan:
        typed = self.graph.layout is not None
        spec = spec_of(self.names, self.statics, None, typed, choice)
        wanted = (1 << len(self.names)) - 1
        return Plan(Request.of(self.layer.id, spec, self.inputs, self.graph.sizes, wanted))

    def rank(self) -> list[Candidate]:
        """Every set of passes by its modelled time; equal programs once."""
        found: dict[str, Candidate] = {}
        for count in range(len(PASSES) + 1):
            for off in itertools.combinations(PASSES, count):
                plan = self.plan(Choice(off))
                programs = (plan.compiled.forward, plan.compiled.backward)
                text = "".join(render(p) for p in programs if p is not None)
                found.setdefault(text, Candidate(Choice(off), self._modelled(plan)))
        return sorted(found.values(), key=lambda c: c.modelled_s)

    def _modelled(self, plan: Plan) -> float:
        nbytes_s, flops_s, start_s = RATES.get(self.device.type, RATES["cpu"])
        total = 0.0
        for runner in (plan.compiled.forward_runner, plan.compiled.backward_runner):
            if runner is None:
                continue
            schedule = runner.schedule or Runner(runner.program, self.dtype, "cpu", "cpp").schedule
            assert schedule is not None
            for number in range(len(schedule.steps)):
                cost = step_cost(schedule, number, plan.sizes, self.dtype.itemsize)
                total += start_s + max(cost.nbytes / nbytes_s, cost.flops / flops_s)
        return total

    def measure(self, ranked: Sequence[Candidate], progress: bool) -> list[Candidate]:
        """Times these sets of passes, then sizes for the fastest; the fastest of all first."""
        sizes = self._sizes()
        with _bar(progress, f"tuning {self.layer.name}", len(ranked) + len(sizes) - 1) as step:
            timed = []
            for candidate in ranked:
                timed.append(replace(candidate, measured_s=self._time(candidate.choice)))
                step()
            best = min(timed, key=_measured)
            for size in sizes[1:]:
                choice = replace(size, disabled=best.choice.disabled)
                timed.append(Candidate(choice, best.modelled_s, self._time(choice)))
                step()
        return sorted(timed, key=_measured)

    def _sizes(self) -> list[Choice]:
        """Sizes that the backend reads, the usual ones first."""
        usual = Choice()
        if self.backend == "triton":
            found = [Choice(block_elements=n) for n in BLOCK_ELEMENTS]
        elif self.backend == "cpp":
            found = [Choice(parts_per_thread=n) for n in PARTS_PER_THREAD]
        else:
            found = []
        return [usual, *(choice for choice in found if choice != usual)]

    def _time(self, choice: Choice) -> float:
        """Median seconds of forward and backward, after one run that compiles."""
        plan = self.plan(choice)
        view = View(self.graph, plan.sizes)

        def run() -> None:
            outputs, saved = plan.run_forward(view, self.inputs)
            plan.run_backward(view, outputs, self.inputs, outputs, saved)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        run()
        rounds: list[float] = []
        while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and sum(rounds) < SECONDS):
            start = time.perf_counter()
            run()
            rounds.append(time.perf_counter() - start)
        return statistics.median(rounds)


def _measured(candidate: Candidate) -> float:
    return float("inf") if candidate.measured_s is None else candidate.measured_s


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} {torch.get_num_threads()} threads"


@contextmanager
def _bar(wanted: bool, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on the terminal, where there is one; erased at the end."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def _read(path: Path, measured: bool) -> Tuning | None:
    """What is kept, unless it was only modelled and measurements are wanted."""
    try:
        kept = json.loads(path.read_text())
        found = tuple(_candidate(each) for each in kept["candidates"])
    except (OSError, ValueError, KeyError, TypeError):  # absent, or cut off, or of other fields
        return None
    if not found or (measured and not kept["measured"]):
        return None
    return Tuning(found[0].choice, found, True, path)


def _candidate(kept: dict[str, Any]) -> Candidate:
    choice = kept["choice"]
    return Candidate(
        Choice(**{**choice, "disabled": tuple(choice["disabled"])}),
        kept["modelled_s"],
        kept["measured_s"],
    )


def _write(found: Tuning, measured: bool) -> None:
    """Whole or not at all: the file appears by rename. What was measured holds without it too."""
    kept = {"measured": measured, "candidates": [asdict(c) for c in found.candidates]}
    folder = found.path.parent
    part = folder / f"{found.path.stem}.{os.getpid()}-{threading.get_ident()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(kept, indent=2))
        os.replace(part, found.path)
    except OSError as error:
        warnings.warn(
            f"the choice holds for this process only: {found.path} was not written ({error}); "
            "set DATAEFF_CACHE_DIR to a folder with space to write in",
            RuntimeWarning,
            stacklevel=3,
        )
    finally:
        if folder.is_dir():
            part.unlink(missing_ok=True)
