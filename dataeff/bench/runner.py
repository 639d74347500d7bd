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
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from dataeff.bench.case import Case, Options, Provider, Unavailable
from dataeff.bench.lane import Lane, synchronize
from dataeff.bench.processor_time import ProcessorTime
from dataeff.bench.record import Record, Run
from dataeff.bench.recorder import Recorder

MIN_ROUNDS = 3
MAX_CALLS_PER_SAMPLE = 1000
LONG_CALL_S = 1.0
SETTLED_S = 1.0
SETTLED_SPREAD = 0.1  # of the median
OURS_LONGER = 30  # times a case's `long_call_s`: what is reported of ours rests on several rounds


class DisagreementError(RuntimeError):
    """Two providers of one case returned different results: neither's time means anything."""


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
        record = Recorder(workload, case, run)
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
        except torch.OutOfMemoryError as error:
            if lane.provider.role != "peer":
                raise
            torch.cuda.empty_cache()  # what it left behind is not to be the next one's lack
            skipped.append((lane.provider, str(error).splitlines()[0]))
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
    synchronize(device)
    start = time.perf_counter()
    result = lane.step.call()
    synchronize(device)
    lane.long = time.perf_counter() - start > _longest_s(lane, case)
    return result


def _longest_s(lane: Lane, case: Case) -> float:
    """Seconds that a call may take and still be timed in every round."""
    return case.long_call_s * (OURS_LONGER if lane.provider.role == "ours" else 1)


def _warm_up(lane: Lane, case: Case, options: Options) -> None:
    if lane.long:
        return
    if case.num_calls is not None:
        lane.sample(options.device)
        return
    elapsed_s = 0.0
    for _ in range(options.num_warmups):
        elapsed_s = lane.sample(options.device)
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
            lane.samples.append(lane.sample(options.device))
            if lane.long and lane.samples[0] <= _longest_s(lane, case):
                # Its first call loaded or compiled what it needs: it is timed as the others are.
                lane.long = False
                _warm_up(lane, case, options)
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
