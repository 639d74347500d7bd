"""Times the providers of a case, interleaved round by round so that noise meets all alike.

Every provider's result is compared with the first one's before the clock starts. Round r starts
with provider r, so that none always runs after the same other. Reported is the median over rounds
with the distance between the quartiles (of a ceiling's rate, the best round), beside them the
fastest round; the garbage collector is off while the clock runs.

A call that takes longer than the case's `long_call_s` is made twice in all, compared and in the
first round, which is its one sample; where only the first took so long, it counts as a warm-up.
A program that takes one of two cores stretches short calls to whole time slices, ours and theirs
alike, and no median mends that: `busy_elsewhere` then says what share of the processors' time
others took during the rounds.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.processor_time import ProcessorTime
from dataeff.bench.record import Record, Run

MIN_ROUNDS = 3
MAX_CALLS_PER_SAMPLE = 1000
LONG_CALL_S = 1.0
SETTLED_S = 1.0
SETTLED_SPREAD = 0.1  # of the median
CALM_SHARE = 0.05
OURS_LONGER = 10  # times a case's `long_call_s`: what is reported of ours rests on several rounds


class DisagreementError(RuntimeError):
    """Two providers of one case returned different results: neither's time means anything."""


@dataclass
class Lane:
    """One provider in a running case: its step and the seconds per call sampled so far.

    `long`: its calls take so long that one is timed.
    """

    provider: Provider
    step: Step
    num_calls: int = 1
    samples: list[float] = field(default_factory=list)
    long: bool = False

    @property
    def median_s(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples)

    @property
    def quartile_distance_s(self) -> float:
        """Seconds between the first and the third quartile of the samples; 0 of one sample."""
        if len(self.samples) == 1:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def rate(self, amount: int) -> float:
        """`amount` per second: at the median, or, of a ceiling, at the best sample.

        A ceiling is what the machine can do, so what disturbed its other samples does not count.
        """
        ceiling = self.provider.role == "ceiling"
        return amount / (min(self.samples) if ceiling else self.median_s)


def run_workload(
    workload: str,
    cases: Iterable[Case],
    options: Options,
    say: Callable[[str], None],
    keep: Callable[[list[Record]], None] = lambda records: None,
) -> list[Record]:
    """Runs all cases and returns their records.

    `say` gets a line when a case starts and when one fails, `keep` all records so far when one has
    ended: what fails or is interrupted does not take along the others.

    Raises:
        The first case's failure, when all have been run.
    """
    run = Run.here(options.device)
    records: list[Record] = []
    failure: Exception | None = None
    for case in cases:
        say(f"{workload}: {case.size}")
        try:
            records += run_case(workload, case, options, run)
        except Exception as error:
            say(f"{workload}: {case.size} failed: {error}")
            failure = failure or error
            continue
        keep(records)
    if failure is not None:
        raise failure
    return records


def run_case(workload: str, case: Case, options: Options, run: Run) -> list[Record]:
    """Prepares, compares, times and closes the providers of one case.

    Raises:
        DisagreementError: a provider's result is not the first provider's.
    """
    torch.manual_seed(options.seed)
    inputs = case.inputs()
    with ExitStack() as open_steps:
        lanes, skipped = _prepare(case, inputs, options.seed, open_steps)
        lanes = _compare(workload, case, lanes, options.device, skipped)
        with _no_garbage_collection():
            for lane in lanes:
                _warm_up(lane, case, options)
            before = ProcessorTime.now()
            _rounds(lanes, case, options)
            elsewhere = ProcessorTime.now().elsewhere_since(before)
        record = _Recorder(workload, case, run)
        records: list[Record] = []
        for lane in lanes:
            records += record.measured(lane, [c for c in lanes if c.provider.role == "ceiling"])
            records += record.against(lane, lanes[0])
            records += record.peak(lane, options.device)
            records += record.disturbed(lane, elsewhere)
        return records + [record.skipped(provider, reason) for provider, reason in skipped]


def _prepare(
    case: Case, inputs: Any, seed: int, open_steps: ExitStack
) -> tuple[list[Lane], list[tuple[Provider, str]]]:
    lanes, skipped = [], []
    for provider in (*case.providers, *case.ceilings):
        torch.manual_seed(seed)
        try:
            step = provider.prepare(inputs)
        except Unavailable as reason:
            skipped.append((provider, str(reason)))
            continue
        if step.close is not None:
            open_steps.callback(step.close)
        lanes.append(Lane(provider, step))
    return lanes, skipped


def _compare(
    workload: str,
    case: Case,
    lanes: list[Lane],
    device: torch.device,
    skipped: list[tuple[Provider, str]],
) -> list[Lane]:
    """The lanes whose first call came to an end; those that decline join the skipped ones."""
    called: list[Lane] = []
    expected: Any = None
    for lane in lanes:
        if lane.provider.role == "ceiling":
            called.append(lane)
            continue
        try:
            actual = _first_call(lane, case, device)
        except Unavailable as reason:
            skipped.append((lane.provider, str(reason)))
            continue
        if not called:
            first, expected = lane, actual
        else:
            try:
                case.assert_same(expected, actual)
            except AssertionError as difference:
                raise DisagreementError(
                    f"{workload}, {case.size}: {lane.provider.name} returns something else than "
                    f"{first.provider.name}: {difference}"
                ) from difference
        called.append(lane)
    return called


def _first_call(lane: Lane, case: Case, device: torch.device) -> Any:
    """The result of a provider's first call, which also tells how long its calls are."""
    if lane.step.before is not None:
        lane.step.before()
    _synchronize(device)
    start = time.perf_counter()
    result = lane.step.call()
    _synchronize(device)
    lane.long = time.perf_counter() - start > _longest_s(lane, case)
    return result


def _longest_s(lane: Lane, case: Case) -> float:
    """Seconds that a call may take and still be timed in every round."""
    return case.long_call_s * (OURS_LONGER if lane.provider.role == "ours" else 1)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(lane: Lane, device: torch.device) -> float:
    """Seconds per call over `num_calls` calls; the device is idle at both ends."""
    if lane.step.before is not None:
        lane.step.before()
    _synchronize(device)
    start_ns = time.perf_counter_ns()
    for _ in range(lane.num_calls):
        lane.step.call()
    _synchronize(device)
    return (time.perf_counter_ns() - start_ns) / 1e9 / lane.num_calls


def _warm_up(lane: Lane, case: Case, options: Options) -> None:
    if lane.long:
        return
    if case.num_calls is not None:
        _sample(lane, options.device)
        return
    elapsed_s = 0.0
    for _ in range(options.num_warmups):
        elapsed_s = _sample(lane, options.device)
        if elapsed_s > LONG_CALL_S:  # the call that was compared has warmed what such a one needs
            break
    # What `before` prepares holds for one call only, so such a step is not repeated in a sample.
    if lane.step.before is None:
        wanted = math.ceil(options.min_sample_s / max(elapsed_s, 1e-9))
        lane.num_calls = min(max(wanted, 1), MAX_CALLS_PER_SAMPLE)


def _rounds(lanes: list[Lane], case: Case, options: Options) -> None:
    budget_s, num_rounds = min(case.budget_s, options.budget_s), options.num_rounds
    if case.num_calls is not None:  # one was compared, one warmed up
        budget_s, num_rounds = math.inf, max(MIN_ROUNDS, case.num_calls - 2)
    start = time.perf_counter()
    for index in itertools.count():
        elapsed_s = time.perf_counter() - start
        if index >= MIN_ROUNDS and elapsed_s > budget_s:
            return
        if index >= num_rounds and (elapsed_s >= case.settle_s or _settled(lanes, elapsed_s)):
            return
        first = index % max(len(lanes), 1)
        for lane in (*lanes[first:], *lanes[:first]):
            if lane.long and lane.samples:
                continue
            lane.samples.append(_sample(lane, options.device))
            lane.long = lane.long and lane.samples[0] > _longest_s(lane, case)
        gc.collect()


def _settled(lanes: list[Lane], elapsed_s: float) -> bool:
    """Whether more rounds would tell nothing new: a second of them, and each lane's spread small.

    Fifteen rounds of milliseconds are over before another program, which took a core, is done.
    """
    return elapsed_s > SETTLED_S and all(
        lane.quartile_distance_s <= SETTLED_SPREAD * lane.median_s for lane in lanes
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Off while the clock runs; what the rounds leave behind is collected between them."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # so that the collections between rounds look only at what the rounds made
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


class _Recorder:
    """Turns the lanes of one case into records."""

    def __init__(self, workload: str, case: Case, run: Run) -> None:
        self.workload, self.case, self.run = workload, case, run

    def _record(
        self, provider: Provider, metric: str, value: float | None, unit: str, note: str = ""
    ) -> Record:
        return self.run.record(
            workload=self.workload,
            provider=provider.name,
            role=provider.role,
            metric=metric,
            value=value,
            unit=unit,
            size=self.case.size,
            note=note,
            group=self.case.group,
        )

    def skipped(self, provider: Provider, reason: str) -> Record:
        return self._record(provider, "skipped", None, "1", reason)

    def measured(self, lane: Lane, ceilings: list[Lane]) -> list[Record]:
        """Time, spread, rates, shares of the ceilings, and what the step itself reports.

        A long peer is not asked for more: its figures may take another call.
        """
        figures = [
            ("time_s", lane.median_s, "s"),
            ("time_spread_s", lane.quartile_distance_s, "s"),
            ("time_min_s", min(lane.samples), "s"),
            ("num_rounds", float(len(lane.samples)), "1"),
        ]
        nbytes = self.case.nbytes if lane.step.nbytes is None else lane.step.nbytes
        flops = self.case.flops if lane.step.flops is None else lane.step.flops
        if lane.provider.role == "ceiling":  # a copy's operations or a product's bytes bound nobody
            nbytes, flops = lane.step.nbytes or 0, lane.step.flops or 0
        if nbytes:
            figures.append(("bandwidth_gbs", lane.rate(nbytes) / 1e9, "GB/s"))
        if flops:
            figures.append(("rate_gflops", lane.rate(flops) / 1e9, "GFLOP/s"))
        if lane.provider.role != "ceiling":
            figures += self._shares(lane, nbytes, flops, ceilings)
        if lane.step.metrics is not None and not (lane.long and lane.provider.role == "peer"):
            figures += [(name, value, unit) for name, (value, unit) in lane.step.metrics().items()]
        return [self._record(lane.provider, *figure) for figure in figures]

    def against(self, lane: Lane, first: Lane) -> list[Record]:
        """Median over rounds of the time as a multiple of the first provider's in that round.

        What slows a whole round, another program say, slows both and drops out. Rounds that one of
        them did not take part in do not count.
        """
        if lane is first or "ceiling" in (lane.provider.role, first.provider.role):
            return []
        pairs = zip(lane.samples, first.samples, strict=False)
        ratio = statistics.median(mine / its for mine, its in pairs if its > 0)
        return [self._record(lane.provider, "time_ratio", ratio, "1")]

    def disturbed(self, lane: Lane, elsewhere: float) -> list[Record]:
        """What other programs took of the processors meanwhile, where it is enough to mistrust."""
        if lane.provider.role != "ours" or elsewhere <= CALM_SHARE:
            return []
        return [self._record(lane.provider, "busy_elsewhere", elsewhere, "1")]

    @staticmethod
    def _shares(
        lane: Lane, nbytes: int, flops: int, ceilings: list[Lane]
    ) -> list[tuple[str, float, str]]:
        shares = []
        for ceiling in ceilings:
            for mine, bound in ((nbytes, ceiling.step.nbytes), (flops, ceiling.step.flops)):
                if mine and bound:
                    share = lane.rate(mine) / ceiling.rate(bound)
                    shares.append((f"share_of_{ceiling.provider.name}", share, "1"))
        copies = [c.rate(c.step.nbytes) for c in ceilings if c.step.nbytes]
        products = [c.rate(c.step.flops) for c in ceilings if c.step.flops]
        if lane.step.kernels and copies and products:
            bounds_s = [max(b / copies[0], f / products[0]) for b, f in lane.step.kernels]
            shares.append(("share_of_roofline", sum(bounds_s) / lane.median_s, "1"))
        return shares

    def peak(self, lane: Lane, device: torch.device) -> list[Record]:
        """Device memory that one call takes at its peak, beyond what was held before it."""
        if device.type != "cuda" or lane.provider.role == "ceiling":
            return []
        if lane.step.before is not None:
            lane.step.before()
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        lane.step.call()
        _synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - held
        return [self._record(lane.provider, "peak_device_bytes", float(peak), "bytes")]
