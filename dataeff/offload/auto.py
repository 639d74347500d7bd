"""`policy="auto"`: measure a step, plan, carry the plan out, and say how good it was."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from dataeff.ledger import Tier
from dataeff.offload.passes import Budgets
from dataeff.offload.planner import Action, Plan, TierRate, plan
from dataeff.offload.policy import SavedTensorInfo
from dataeff.offload.profile import BlockProfiler, find_blocks
from dataeff.offload.recompute import checkpoint
from dataeff.offload.report import ModuleBytes
from dataeff.offload.simulate import Forecast, simulate
from dataeff.offload.tiers import Tiers

_WARM_UP_STEPS = 1
_MEASURED_STEPS = 3
_ACTION_OF = {Tier.HOST: Action.HOST, Tier.DISK: Action.DISK}


class AutoPolicy:
    """Moves everything while it measures (so that measuring fits), then follows its plan.

    Step 1 warms up, steps 2 to 4 are measured, and the plan holds from step 5 on; a step is one
    `with` block.

    Args:
        model: the model; its largest list of blocks is planned (`find_blocks`).
        tiers: whose rates are measured.
        memory_budget: bytes that may be held for backward at once; without one, what hides behind
            compute is moved.
        budgets: what the user bounds in flight; the rest is chosen with the plan.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tiers: Tiers,
        memory_budget: float | None,
        budgets: Budgets | None = None,
    ) -> None:
        self._model, self._tiers, self._budget = model, tiers, memory_budget
        self._given = budgets or Budgets()
        self._blocks = find_blocks(model)
        self._profiler: BlockProfiler | None = None
        self._before: dict[str, ModuleBytes] = {}
        self._num_steps = 0
        self._start_s = 0.0
        self._step_s: list[float] = []
        self._exposed_s = self._exposed_before_s = 0.0
        self._wrapped: list[torch.nn.Module] = []
        self._largest = 0  # bytes of the largest storage that may move
        self.other_bytes = 0
        self.plan: Plan | None = None
        self.forecast: Forecast | None = None

    def measured(self, recent_peak: int) -> Forecast | None:
        """What the steps since showed, in the terms of the forecast; None before one."""
        step_s = self.measured_step_s
        if step_s is None:
            return None
        exposed_s, peak = self._exposed_s / len(self._step_s), float(recent_peak)
        return Forecast(step_s, exposed_s, peak, peak)

    @property
    def measured_step_s(self) -> float | None:
        """Median seconds of the steps since the plan was made."""
        return statistics.median(self._step_s) if self._step_s else None

    def __call__(self, info: SavedTensorInfo) -> bool | Tier:
        """Where a tensor goes."""
        if self.plan is None:
            self._largest = max(self._largest, info.storage_nbytes)
            return True
        action = self.plan.action_of(info.scope)
        return {Action.HOST: Tier.HOST, Action.DISK: Tier.DISK}.get(action, False)

    def begin_step(self, cache: Any) -> None:
        """A `with` block begins."""
        if self._num_steps == _WARM_UP_STEPS:
            device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
            self._profiler = BlockProfiler(self._blocks, device)
            modules = cache.account.by_module
            self._before = {name: replace(bytes_) for name, bytes_ in modules.items()}
            self._profiler.install(lambda: cache.counters.exposed_wait_s)
        if self.plan is None and self._profiler is not None:
            self._profiler.begin()
        self._start_s = time.perf_counter()

    def end_step(self, cache: Any) -> None:
        """A `with` block ends, with its backward."""
        self._num_steps += 1
        if self.plan is not None:
            self._step_s.append(time.perf_counter() - self._start_s)
            self._exposed_s = cache.counters.exposed_wait_s - self._exposed_before_s
        elif self._profiler is not None:
            self._profiler.end()
            if self._profiler.num_steps == _MEASURED_STEPS:
                self._profiler.remove()
                self._make_plan(self._profiler, cache)
                cache.held.recent_peak = 0
                self._exposed_before_s = cache.counters.exposed_wait_s

    def close(self) -> None:
        """Takes recomputation off the model."""
        while self._wrapped:
            del self._wrapped.pop().forward

    def explain(self, recent_peak: int) -> str:
        """The plan as a table, and what was measured since."""
        if self.plan is None:
            return (
                f"No plan yet: the first step warms up, {_MEASURED_STEPS} are measured, "
                f"{self._num_steps} are done."
            )
        assert self.forecast is not None
        lines = [str(self.plan)]
        if self.other_bytes:
            lines.append(f"outside these modules: {self.other_bytes / 2**20:.1f} MiB are kept")
        forecast = self.forecast
        lines.append(
            f"predicted: peak {forecast.peak_bytes / 2**20:.1f} MiB, "
            f"step {1e3 * forecast.step_s:.1f} ms"
        )
        step_s = self.measured_step_s
        if step_s is not None:
            lines.append(
                f"measured since: peak {recent_peak / 2**20:.1f} MiB "
                f"({_percent(recent_peak, forecast.seen_bytes)}), "
                f"step {1e3 * step_s:.1f} ms ({_percent(step_s, forecast.step_s)}; "
                f"median of {len(self._step_s)})"
            )
        return "\n".join(lines)

    def _make_plan(self, profiler: BlockProfiler, cache: Any) -> None:
        saved = {
            name: _since(account, self._before.get(name, ModuleBytes()))
            for name, account in cache.account.by_module.items()
        }
        profiles = profiler.profiles(saved)
        inside = sum(p.saved_bytes for p in profiles)
        all_bytes = sum(b.bytes_saved for b in saved.values()) // profiler.num_steps
        self.other_bytes = max(0, all_bytes - inside)
        budget = None if self._budget is None else max(0.0, self._budget - self.other_bytes)
        rates = self._tiers.measure(next(iter(self._devices()), torch.device("cpu")))
        self.plan = plan(
            profiles, host=rates.get(Tier.HOST), disk=rates.get(Tier.DISK), memory_budget=budget
        )
        self._foresee(self.plan, rates, profiler.other_s(profiles), cache)
        for profile, action in zip(profiles, self.plan.actions, strict=True):
            if action is Action.RECOMPUTE:
                self._recompute(self._blocks[profile.name])

    def _foresee(self, plan: Plan, rates: dict[Tier, TierRate], other_s: float, cache: Any) -> None:
        """Bounds what is in flight by the plan's working set, and simulates a step of it."""
        moved = [
            profile.moved_bytes
            for profile, action in zip(plan.profiles, plan.actions, strict=True)
            if action in (Action.HOST, Action.DISK)
        ]
        given = self._given
        largest = max(moved, default=0) or None
        budgets = Budgets(given.in_flight or largest, given.prefetch or largest)
        cache.set_budgets(budgets)
        self.forecast = simulate(
            plan.profiles,
            plan.actions,
            {_ACTION_OF[tier]: rate for tier, rate in rates.items()},
            part_bytes=self._largest or None,
            limit=min(budgets.in_flight or 0, budgets.prefetch or 0),
            other_s=other_s,
            other_bytes=self.other_bytes,
        )

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self._model.parameters()}

    def _recompute(self, block: torch.nn.Module) -> None:
        forward = block.forward

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, **kwargs)

        block.forward = recomputed
        self._wrapped.append(block)


def _since(now: ModuleBytes, before: ModuleBytes) -> ModuleBytes:
    return ModuleBytes(now.bytes_saved - before.bytes_saved, now.bytes_stored - before.bytes_stored)


def _percent(measured: float, predicted: float) -> str:
    return f"{100 * (measured / predicted - 1):+.0f} %" if predicted else "nothing predicted"
