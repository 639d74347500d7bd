"""`policy="auto"`: measure a step, plan, carry the plan out, and say how good it was."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from dataeff.ledger import Tier
from dataeff.offload.planner import Action, Plan, plan
from dataeff.offload.policy import SavedTensorInfo
from dataeff.offload.profile import BlockProfiler, find_blocks
from dataeff.offload.recompute import checkpoint
from dataeff.offload.report import ModuleBytes
from dataeff.offload.tiers import Tiers

_WARM_UP_STEPS = 1


class AutoPolicy:
    """Moves everything while it measures (so that measuring fits), then follows its plan.

    Step 1 warms up, step 2 is measured, and the plan holds from step 3 on; a step is one `with`
    block.

    Args:
        model: the model; its largest list of blocks is planned (`find_blocks`).
        tiers: whose rates are measured.
        memory_budget: bytes that may be held for backward at once; without one, what hides behind
            compute is moved.
    """

    def __init__(self, model: torch.nn.Module, tiers: Tiers, memory_budget: float | None) -> None:
        self._model, self._tiers, self._budget = model, tiers, memory_budget
        self._blocks = find_blocks(model)
        self._profiler: BlockProfiler | None = None
        self._before: dict[str, int] = {}
        self._num_steps = 0
        self._start_s = 0.0
        self._step_s: list[float] = []
        self._wrapped: list[torch.nn.Module] = []
        self.other_bytes = 0
        self.plan: Plan | None = None

    def __call__(self, info: SavedTensorInfo) -> bool | Tier:
        """Where a tensor goes."""
        if self.plan is None:
            return True
        action = self.plan.action_of(info.scope)
        return {Action.HOST: Tier.HOST, Action.DISK: Tier.DISK}.get(action, False)

    def begin_step(self, cache: Any) -> None:
        """A `with` block begins."""
        if self._num_steps == _WARM_UP_STEPS:
            device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
            self._profiler = BlockProfiler(self._blocks, device)
            self._before = {name: b.bytes_saved for name, b in cache.account.by_module.items()}
            self._profiler.install(lambda: cache.counters.exposed_wait_s)
        self._start_s = time.perf_counter()

    def end_step(self, cache: Any) -> None:
        """A `with` block ends, with its backward."""
        self._num_steps += 1
        if self.plan is not None:
            self._step_s.append(time.perf_counter() - self._start_s)
        elif self._profiler is not None:
            self._profiler.end()
            self._profiler.remove()
            self._make_plan(self._profiler, cache)
            cache.held.recent_peak = 0

    def close(self) -> None:
        """Takes recomputation off the model."""
        while self._wrapped:
            del self._wrapped.pop().forward

    def explain(self, recent_peak: int) -> str:
        """The plan as a table, and what was measured since."""
        if self.plan is None:
            return "No plan yet: the first step warms up, the second is measured."
        lines = [str(self.plan)]
        if self.other_bytes:
            lines.append(f"outside these modules: {self.other_bytes / 2**20:.1f} MiB are kept")
        if self._step_s:
            lines.append(
                f"measured since: peak {recent_peak / 2**20:.1f} MiB, step "
                f"{1e3 * statistics.median(self._step_s):.1f} ms (median of {len(self._step_s)})"
            )
        return "\n".join(lines)

    def _make_plan(self, profiler: BlockProfiler, cache: Any) -> None:
        saved = {
            name: ModuleBytes(account.bytes_saved - self._before.get(name, 0))
            for name, account in cache.account.by_module.items()
        }
        profiles = profiler.profiles(saved)
        inside = sum(p.saved_bytes for p in profiles)
        self.other_bytes = sum(b.bytes_saved for b in saved.values()) - inside
        budget = None if self._budget is None else max(0.0, self._budget - self.other_bytes)
        rates = self._tiers.measure(next(iter(self._devices()), torch.device("cpu")))
        self.plan = plan(
            profiles, host=rates.get(Tier.HOST), disk=rates.get(Tier.DISK), memory_budget=budget
        )
        for profile, action in zip(profiles, self.plan.actions, strict=True):
            if action is Action.RECOMPUTE:
                self._recompute(self._blocks[profile.name])

    def _devices(self) -> set[torch.device]:
        return {p.device for p in self._model.parameters()}

    def _recompute(self, block: torch.nn.Module) -> None:
        forward = block.forward

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, **kwargs)

        block.forward = recomputed
        self._wrapped.append(block)
