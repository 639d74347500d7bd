"""`policy="auto"`: what the planner predicts beside what is measured, at several budgets.

A shared machine's pace changes by a tenth within seconds, and with it every step alike: a step that
was measured cannot be told from one that was predicted well. Therefore plain steps are taken in
turn with the planned ones, while the planner measures and while its plan is followed, and the
prediction is held against the measurement at the pace of the latter:

    step_error = |predicted_step_s * pace_change / measured_step_s - 1|
    pace_change = plain step while the plan was followed / plain step while it was made
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from dataeff import ActivationOffload
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.lane import synchronize
from dataeff.bench.offload.model import Shape
from dataeff.bench.offload.training import (
    Inputs,
    Metrics,
    Training,
    keep,
    make_inputs,
    offloaded,
    peak_of,
)

NUM_PLANS = 3  # one after another, of which the one of the middle error is reported
FOLLOWED_STEPS = 10
NEW_STEPS = 2  # after a plan is made: its budgets are new
SHARES = (0.75, 0.5, 0.25)


def cases(options: Options) -> Iterator[Case]:
    """A GPT and an MLP, each with a provider per share of what keeping holds.

    On two idle cores of a server: about a minute and a half.
    """
    gpt = options.pick(full=Shape(6, 256, 4, 128), quick=Shape(4, 256, 4, 64))
    shares = options.pick(full=SHARES, quick=(0.5,))
    for shape in options.pick(full=(gpt, replace(gpt, kind="mlp")), quick=(gpt,)):
        yield Case(
            size=f"planned: {shape}",
            group="planned for a share of the memory",
            budget_s=10.0,
            inputs=partial(make_inputs, shape, options),
            providers=(Provider("keep", keep), *(provider(share) for share in shares)),
        )


def provider(share: float) -> Provider:
    """The plan for `share` of the memory that keeping holds."""
    return Provider(f"dataeff auto {share:.0%}", partial(auto, share=share), role="ours")


def auto(inputs: Inputs, share: float) -> Step:
    """Follows the last of `NUM_PLANS` plans whose peak is `share` of that of keeping."""
    try:
        import scipy.optimize  # noqa: F401  (the planner's solver)
    except ImportError as error:
        raise Unavailable("the package scipy is not installed") from error
    budget = share * peak_of(inputs.training(), inputs.directory)
    options: dict[str, Any] = {"policy": "auto", "memory_budget": budget, "min_bytes": 1 << 18}
    found: Metrics = {}

    def first(training: Training, offload: ActivationOffload) -> None:
        plans = []
        for _ in range(NUM_PLANS - 1):
            other = ActivationOffload(training.model, inputs.directory, **options)
            plans.append(_against(training, other))
            other.close()
        plans.append(_against(training, offload))
        found.update(sorted(plans, key=lambda plan: plan["step_error"])[NUM_PLANS // 2])

    return offloaded(inputs, first=first, more=lambda offload: found, **options)


def _against(training: Training, offload: ActivationOffload) -> Metrics:
    """Prediction and measurement, and by how much the first was wrong."""
    made, followed = list[float](), list[float]()
    while offload.plan is None:
        made.append(_plain_s(training))
        training.step(offload)
    for _ in range(NEW_STEPS):
        training.step(offload)
    for _ in range(FOLLOWED_STEPS):
        followed.append(_plain_s(training))
        training.step(offload)
    predicted, measured = offload.forecast, offload.measured
    assert predicted is not None and measured is not None
    # Neither the first plain steps nor those of the offload before it measures count.
    pace_change = statistics.median(followed) / statistics.median(made[2:])
    # What a recomputed block holds during its backward no hook sees; of torch's checkpoint the
    # benchmark counts it, so it is counted here, as forecast. The error is of what hooks see.
    unseen = predicted.peak_bytes - predicted.seen_bytes
    return {
        # Without the steps that measured.
        "seen_peak_bytes": (measured.peak_bytes, "bytes"),
        "peak_saved_bytes": (measured.peak_bytes + unseen, "bytes"),
        "predicted_step_s": (predicted.step_s, "s"),
        "measured_step_s": (measured.step_s, "s"),
        "pace_change": (pace_change, "1"),
        "step_error": (abs(predicted.step_s * pace_change / measured.step_s - 1), "1"),
        "predicted_peak_bytes": (predicted.peak_bytes, "bytes"),
        "peak_error": (abs(predicted.seen_bytes / measured.peak_bytes - 1), "1"),
    }


def _plain_s(training: Training) -> float:
    synchronize(training.tokens.device)
    start_s = time.perf_counter()
    training.step(nullcontext())
    synchronize(training.tokens.device)
    return time.perf_counter() - start_s
