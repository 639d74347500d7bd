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
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from dataeff._version import __version__
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.cost import product_of, step_cost, tile_of
from dataeff.rgnn.cpp.toolchain import cache_dir, cpu_name
from dataeff.rgnn.kernels_ir import Gemm
from dataeff.rgnn.layer import Call, Layer, choice_key, hear_calls
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.profile import statistics_of
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.text import render
from dataeff.rgnn.triton.gemm import capability, float32_precision
from dataeff.rgnn.triton.tiles import GemmSchedule, Product, modelled_s, ranked_tiles
from dataeff.rgnn.view import View

if TYPE_CHECKING:
    from dataeff.rgnn.graph import Graph

PASSES = ("compact", "reorder", "aggregate_first", "spread")
# Elements of a Triton traversal's block and its warps: at most 1024 elements a warp, which do not
# spill, and at most 4 warps, since the long rows' 8 then have 255 registers a thread.
BLOCKS = ((1024, 4), (4096, 4), (1024, 2), (2048, 2))
LONG_ROWS = (32, 512)
HUBS = (1024, 16384)
LONG_STAGES = (2, 3)
PARTS_PER_THREAD = (4, 16, 64)
# Rates that only rank candidates: bytes and flops a second, and seconds to start a kernel.
RATES = {"cpu": (10e9, 50e9, 2e-6), "cuda": (2e12, 30e12, 5e-6)}
MIN_ROUNDS, MAX_ROUNDS, SECONDS = 3, 30, 0.25
# Seconds of a choice, by running one step of it.
Timer = Callable[[Choice, Callable[[], None]], float]


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


@overload
def tune(layer: Layer, *args: Any, **kwargs: Any) -> Tuning: ...


@overload
def tune(layer: nn.Module, *args: Any, **kwargs: Any) -> list[Tuning]: ...


def tune(
    layer: Layer | nn.Module,
    *args: Any,
    measure: bool = True,
    candidates: int = 4,
    progress: bool = True,
    refresh: bool = False,
    timer: Timer | None = None,
    **kwargs: Any,
) -> Tuning | list[Tuning]:
    """Choose passes and sizes for a layer on graphs of this one's statistics.

    ```python
    rgnn.tune(rgat, graph, x, W, a_src, a_dst)  # a layer function
    rgnn.tune(model, x, edge_index, edge_type)  # all layers that a model calls
    ```

    First the passes, then, with the fastest so far, one kind of size after the other: for Triton
    the blocks and warps of traversals, the degree above which rows are long, and for graphs that
    have such rows the degree of hubs and the stages of their loops, the tiles, warps and stages of
    products and of weight gradients; for C++ the parts per thread.

    What is chosen holds for later calls of `layer` with this dtype and these widths, on this kind
    of device, on graphs with as many relations whose row counts round to the same sizes. Results do
    not change but in their rounding. Interrupting it leaves the layer and the files as they were. A
    choice that takes more shared memory, registers or memory than the device has is passed over.

    Args:
        layer: a function decorated with `rgnn.layer`; or a module, a layer of `dataeff.nn` say or
            a model of them. A module is called once, without gradients, as it is (in training mode
            it updates its running statistics): the layers that it calls are tuned one by one.
        *args: what it is called with; of a layer function, a graph like those it will run on
            and the layer's arguments.
        measure: run the best candidates, forward and backward; else the cost model decides alone.
        candidates: how many sets of passes to run, and then of each kind of size at most, those
            first that the cost model ranks first.
        progress: show a bar where the terminal can (needs `rich`).
        refresh: choose anew though a result is kept.
        timer: measures a choice in another way, with a cold cache say: it gets the choice and a
            function that takes one step, and returns seconds. The median of some steps if None.
        **kwargs: more arguments of the layer.

    Returns:
        What was found; of a module, for each different call of a layer, in their order.

    Raises:
        TypeError: `layer` is neither, or does not take these arguments.
        ValueError: `candidates` is less than one; the module calls no compiled layer.
        torch.OutOfMemoryError, triton.runtime.errors.OutOfResources: no set of passes fits.
    """
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; it must be at least 1")
    how = partial(_tune, measure, candidates, progress, refresh, timer or median_s)
    if isinstance(layer, Layer):
        return how(_Search(_call_of(layer, *args, **kwargs)))
    if not isinstance(layer, nn.Module):
        raise TypeError(
            "rgnn.tune takes a function decorated with rgnn.layer or a torch.nn.Module, got "
            + type(layer).__name__
        )
    stance: Any = torch.compiler.set_stance("force_eager")
    with stance, torch.no_grad(), hear_calls() as calls:
        layer(*args, **kwargs)
    if not calls:
        raise ValueError(
            f"{type(layer).__name__} called no compiled layer: dataeff.nn.convert(model) swaps "
            "PyG's for those"
        )
    searches = {(search.layer.id, search.key): search for search in map(_Search, calls)}
    found = []
    for search in searches.values():
        found.append(how(search))
    return found


def _call_of(layer: Layer, graph: Graph, *args: Any, **kwargs: Any) -> Call:
    return Call(layer, graph, *layer.bind(graph, args, kwargs))


def _tune(
    measure: bool, candidates: int, progress: bool, refresh: bool, timer: Timer, search: _Search
) -> Tuning:
    path = cache_dir().parent / "tune" / f"{search.key}.json"
    found = None if refresh else _read(path, measure)
    if found is None:
        ranked = search.rank()
        if measure:
            best = search.measure(ranked[:candidates], candidates, timer, progress)
            ranked = best + ranked[candidates:]
        found = Tuning(ranked[0].choice, tuple(ranked), False, path)
        _write(found, measure)
    graph = search.graph
    for name in {statistics_of(graph.sizes), graph.prepare().profile}:
        search.layer.choices[choice_key(graph, name, search.inputs)] = found.choice
    return found


class _Search:
    """One call of a layer, compiled as each candidate says."""

    def __init__(self, call: Call) -> None:
        self.layer, self.graph, tensors, self.statics = call
        self.names, self.inputs = tuple(tensors), [t.detach() for t in tensors.values()]
        plain = self.plan(Choice())
        self.backend = plain.compiled.forward_runner.name
        self.dtype, self.device = self.inputs[0].dtype, self.inputs[0].device
        self._too_large: BaseException | None = None
        self.tiles_for = self.dtype, float32_precision(), capability(self.device)
        what = (
            __version__,
            _device_name(self.device),
            self.backend,
            float32_precision(),
            render(plain.traced),
            repr(choice_key(self.graph, statistics_of(self.graph.sizes), self.inputs)),
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
            for number, step in enumerate(schedule.steps):
                if self.backend == "triton" and isinstance(step, Gemm):
                    product = product_of(schedule, step, plan.sizes)
                    tile = tile_of(product, runner.choice, *self.tiles_for)
                    total += start_s + modelled_s(tile, product, *self.tiles_for)
                    continue
                cost = step_cost(schedule, number, plan.sizes, self.dtype.itemsize)
                total += start_s + max(cost.nbytes / nbytes_s, cost.flops / flops_s)
        return total

    def measure(
        self, ranked: Sequence[Candidate], at_most: int, timer: Timer, progress: bool
    ) -> list[Candidate]:
        """Times these sets of passes, then sizes for the fastest; the fastest of all first."""
        timed = []
        with _bar(progress, f"tuning {self.layer.name}") as (expect, step):
            expect(len(ranked))
            for candidate in ranked:
                seconds = self._time(candidate.choice, timer)
                timed.append(replace(candidate, measured_s=seconds))
                step()
            if all(candidate.measured_s is None for candidate in timed):
                assert self._too_large is not None
                raise self._too_large
            kinds = self._sizes(min(timed, key=_measured).choice)
            expect(sum(len(kind[:at_most]) for kind in kinds))
            for kind in kinds:
                best = min(timed, key=_measured).choice
                for change in kind[:at_most]:
                    choice = replace(best, **change)
                    modelled = self._modelled(self.plan(choice))
                    timed.append(Candidate(choice, modelled, self._time(choice, timer)))
                    step()
        return sorted(timed, key=_measured)

    def _sizes(self, choice: Choice) -> list[list[dict[str, Any]]]:
        """Of each kind of size that the backend reads, what else there is, the likeliest first."""
        if self.backend == "cpp":
            usual = Choice().parts_per_thread
            return [[{"parts_per_thread": n} for n in PARTS_PER_THREAD if n != usual]]
        if self.backend != "triton":
            return []
        plan = self.plan(choice)
        structure = self.graph.structure
        longest = max(structure.longest("edge.dst"), structure.longest("edge.src"))
        products, gradients = self._tiles(plan, False), self._tiles(plan, True)
        kinds: list[list[dict[str, Any]]] = [
            [{"block_elements": n, "num_warps": w} for n, w in BLOCKS],
            [{"long_row": n} for n in LONG_ROWS],
            [{"hub": n} for n in HUBS if longest > min(HUBS)],
            [{"long_stages": n} for n in LONG_STAGES if longest > min(LONG_ROWS)],
            [{"product": tile} for tile in products],
            [{"gradient": tile} for tile in gradients],
        ]
        return [kind for kind in kinds if kind]

    def _tiles(self, plan: Plan, gradient: bool) -> list[GemmSchedule]:
        """Tiles for all products of a plan, by their modelled time; not what is there already."""
        found: dict[Product, int] = {}
        for runner in (plan.compiled.forward_runner, plan.compiled.backward_runner):
            if runner is None or runner.schedule is None:
                continue
            for step in runner.schedule.steps:
                if isinstance(step, Gemm):
                    product = product_of(runner.schedule, step, plan.sizes)
                    found[product] = found.get(product, 0) + 1
        found = {p: n for p, n in found.items() if p.gradient == gradient}
        if not found:
            return []
        # The largest blocks: those of the widest product. Each product cuts them to itself.
        sizes = {name: max(getattr(p, name) for p in found) for name in ("num_in", "num_out")}
        widest = max(found, key=lambda p: p.num_rows)._replace(**sizes)
        usual = {p: tile_of(p, Choice(), *self.tiles_for) for p in found}
        times: dict[GemmSchedule, float] = {}
        for tile in ranked_tiles(widest, *self.tiles_for):
            choice = Choice(product=tile, gradient=tile)
            cut = {p: tile_of(p, choice, *self.tiles_for) for p in found}
            if cut != usual:
                times[tile] = sum(
                    n * modelled_s(cut[p], p, *self.tiles_for) for p, n in found.items()
                )
        return sorted(times, key=times.__getitem__)

    def _time(self, choice: Choice, timer: Timer) -> float | None:
        """Seconds of a choice; None where it does not fit the device."""
        try:
            return timer(choice, self._step(choice))
        except _does_not_fit() as error:
            self._too_large = error
            return None

    def _step(self, choice: Choice) -> Callable[[], None]:
        plan = self.plan(choice)
        view = View(self.graph, plan.sizes)

        def step() -> None:
            outputs, saved = plan.run_forward(view, self.inputs)
            plan.run_backward(view, outputs, self.inputs, outputs, saved)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return step


def median_s(choice: Choice, step: Callable[[], None]) -> float:
    """Median seconds of forward and backward, after one run that compiles."""
    step()
    rounds: list[float] = []
    while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and sum(rounds) < SECONDS):
        start = time.perf_counter()
        step()
        rounds.append(time.perf_counter() - start)
    return statistics.median(rounds)


def _does_not_fit() -> tuple[type[Exception], ...]:
    """What a choice raises that takes more shared memory, registers or memory than there is."""
    try:
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:  # Triton has no build for this platform
        return (torch.OutOfMemoryError,)
    return torch.OutOfMemoryError, OutOfResources, PTXASError


def _measured(candidate: Candidate) -> float:
    return float("inf") if candidate.measured_s is None else candidate.measured_s


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} {torch.get_num_threads()} threads"


@contextmanager
def _bar(wanted: bool, title: str) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """A progress bar on the terminal, where there is one; erased at the end.

    Yields what says how many more steps are to come, and what says that one is done.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda more: None, lambda: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=0)

        def expect(more: int) -> None:
            bar.update(task, total=(bar.tasks[0].total or 0) + more)

        yield expect, partial(bar.advance, task)


def _read(path: Path, measured: bool) -> Tuning | None:
    """What is kept, unless it was only modelled and measurements are wanted."""
    try:
        kept = json.loads(path.read_text())
        whole = kept.pop("digest") == _digest(kept)
        found = tuple(_candidate(each) for each in kept["candidates"])
    # Absent, or cut off, or of other fields.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not whole or (measured and not kept["measured"]):
        return None
    return Tuning(found[0].choice, found, True, path)


def _digest(kept: dict[str, Any]) -> str:
    """By which a damaged file is known: its numbers become sizes of kernels."""
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _candidate(kept: dict[str, Any]) -> Candidate:
    names = [field.name for field in fields(Choice)]
    disabled, *sizes = (kept["choice"][name] for name in names)
    return Candidate(Choice.of(disabled, sizes), kept["modelled_s"], kept["measured_s"])


def _write(found: Tuning, measured: bool) -> None:
    """Whole or not at all: the file appears by rename. What was measured holds without it too."""
    kept: dict[str, Any] = {
        "measured": measured,
        "candidates": [asdict(candidate) for candidate in found.candidates],
    }
    kept["digest"] = _digest(kept)
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
            stacklevel=4,
        )
    finally:
        if folder.is_dir():
            part.unlink(missing_ok=True)
