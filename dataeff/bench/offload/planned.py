"""`policy="auto"`: what the planner predicts beside what is measured, at several budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from dataeff import ActivationOffload
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.offload.model import Shape
from dataeff.bench.offload.training import Inputs, Metrics, keep, make_inputs, offloaded, peak_of

PLANNING_STEPS = 12  # and one that follows the plan: its budgets are new
SHARES = (0.75, 0.5, 0.25)


def cases(options: Options) -> Iterator[Case]:
    """A GPT and an MLP, each with a provider per share of what keeping holds."""
    gpt = options.pick(full=Shape(8, 512, 4, 256), quick=Shape(4, 256, 4, 64))
    shares = options.pick(full=SHARES, quick=(0.5,))
    for shape in options.pick(full=(gpt, replace(gpt, kind="mlp")), quick=(gpt,)):
        yield Case(
            size=f"planned: {shape}",
            group="planned for a share of the memory",
            budget_s=15.0,
            inputs=partial(make_inputs, shape, options),
            providers=(Provider("keep", keep), *(provider(share) for share in shares)),
        )


def provider(share: float) -> Provider:
    """The plan for `share` of the memory that keeping holds."""
    return Provider(f"dataeff auto {share:.0%}", partial(auto, share=share), role="ours")


def auto(inputs: Inputs, share: float) -> Step:
    """Follows the plan whose peak is `share` of that of keeping."""
    try:
        import scipy.optimize  # noqa: F401  (the planner's solver)
    except ImportError as error:
        raise Unavailable("the package scipy is not installed") from error
    budget = share * peak_of(inputs.training(), inputs.directory)
    return offloaded(
        inputs, policy="auto", memory_budget=budget, more=_against, warm_up=PLANNING_STEPS
    )


def _against(offload: ActivationOffload) -> Metrics:
    """Prediction and measurement since the plan, and by how much the first was wrong."""
    predicted, measured = offload.forecast, offload.measured
    assert predicted is not None and measured is not None
    # What a recomputed block holds during its backward no hook sees; of torch's checkpoint the
    # benchmark counts it, so it is counted here, as forecast. The error is of what hooks see.
    unseen = predicted.peak_bytes - predicted.seen_bytes
    return {
        # Without the steps that measured.
        "seen_peak_bytes": (measured.peak_bytes, "bytes"),
        "peak_saved_bytes": (measured.peak_bytes + unseen, "bytes"),
        "predicted_step_s": (predicted.step_s, "s"),
        "measured_step_s": (measured.step_s, "s"),
        "step_error": (abs(predicted.step_s / measured.step_s - 1), "1"),
        "predicted_peak_bytes": (predicted.peak_bytes, "bytes"),
        "peak_error": (abs(predicted.seen_bytes / measured.peak_bytes - 1), "1"),
    }
