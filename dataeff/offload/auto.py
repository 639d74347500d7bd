"""`policy="auto"`: measure a step, plan, carry the plan out, and say how good it was."""

from __future__ import annotations

import statistics
import warnings
import weakref
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

import torch

from dataeff.ledger import Tier
from dataeff.offload import plan_warnings
from dataeff.offload.exclude import Exclusions
from dataeff.offload.followed import Followed
from dataeff.offload.forwards import Forwards
from dataeff.offload.likeness import Likeness
from dataeff.offload.passes import Budgets, in_backward
from dataeff.offload.planner import Action, Plan, TierRate, check_solver
from dataeff.offload.policy import SavedTensorInfo
from dataeff.offload.profile import BlockProfiler, find_blocks, inside, trials
from dataeff.offload.recompute import Changes, checkpoint
from dataeff.offload.report import ModuleBytes
from dataeff.offload.rounds import Rounds
from dataeff.offload.samples import Samples
from dataeff.offload.scopes import is_compiled
from dataeff.offload.simulate import Forecast, Room
from dataeff.offload.tiers import Tiers
from dataeff.offload.windows import Setting, Windowed, plan_in

_WARM_UP_STEPS = 2
_STEPS_OF_A_KIND = 5  # of which the median counts: two that were disturbed do no harm
_EXCESS = 1.25  # times the budget, which a prediction is not wrong by
_LARGE_STEPS = 16  # one after another, after which steps are planned for that are as large
_MOST_PLANS = 3  # that did not hold, or were for smaller steps; then the last one stays
_IN_FLIGHT_BLOCKS = 2  # on their way; of those recomputed one is whole in memory
_ACTION_OF = {Tier.HOST: Action.HOST, Tier.DISK: Action.DISK}


class AutoPolicy:
    """Measures what can be done with the blocks, then follows its plan.

    Steps 1 and 2 move everything; the second tells how many bytes each block saves. In steps 3 to
    17 the blocks are moved, recomputed and, as many as fit, kept, in turn: five times each. A plan
    without a budget recomputes nothing, and is made after step 12. A step is one `with` block in
    which the model is called with gradients; blocks of evaluation are not counted.

    What is planned for is a step of the median size. One whose inputs are too large for the budget
    moves all blocks; where others exceed it, or 16 together are too large, all begins anew from
    step 2, three times at most.

    Args:
        model: the model; its largest lists of blocks are planned (`find_blocks`).
        tiers: whose rates are measured.
        exclusions: knows what is alive anyway, and costs nothing as the input of a block.
        memory_budget: bytes that may be held for backward at once; without one, what hides behind
            compute is moved.
        budgets: what the user bounds in flight; the rest is chosen with the plan.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tiers: Tiers,
        exclusions: Exclusions,
        memory_budget: float | None,
        budgets: Budgets,
    ) -> None:
        check_solver()
        self._model, self._tiers, self._budget = model, tiers, memory_budget
        self._exclusions, self._given = exclusions, budgets
        self._blocks = find_blocks(model)
        self._new_before = 0  # what was saved when the step under way began
        self._changes = Changes()
        self._changed: dict[str, str] = {}  # blocks that cannot be run again, and what changes
        self._rounds = Rounds(lambda scope: _block_of(scope, self._blocks) is not None)
        self._forwards = Forwards()
        self._again = set[str]()  # blocks that may be recomputed
        self._saved: dict[str, ModuleBytes] = {}
        self._blind = False  # whether nothing is seen of the blocks
        self._largest = 0  # load of one call that the plan was made for
        self._said_larger = False
        self._num_plans = 0  # that were given up
        self.other_bytes = 0
        self._cache: Callable[[], Any] = lambda: None
        self._start(0)

    def _start(self, num_steps: int) -> None:
        """Begins to measure, after `num_steps` that have warmed up."""
        self._num_steps = num_steps
        self._profiler: BlockProfiler | None = None
        self.likeness = Likeness()
        self._nums_of_rounds: list[int] = []  # of the steps that the plan is made from
        self._num_rounds = 1  # of most of them
        self._trials: list[dict[str, Action]] = []
        self._trial: dict[str, Action] | None = None
        self._samples = Samples()
        self.again_bytes = 0  # what backward saves, outside of the blocks
        self.plan: Plan | None = None
        self.forecast: Forecast | None = None
        self._room: Room | None = None
        self._behind = 0  # bytes that blocks keep since something was moved
        self._before: int | None = None  # bytes held when the first block of the step saves
        self._num_large = 0  # steps too large for the plan, one after another
        self._followed: Followed | None = None  # since there is a plan

    def measured(self) -> Forecast | None:
        """What the steps since showed, in the terms of the forecast; None before one.

        Of those that are like the steps that the plan was made from.
        """
        return None if self._followed is None else self._followed.measured()

    def __call__(self, info: SavedTensorInfo) -> bool | Tier:
        """Where a tensor goes."""
        if self.plan is not None:
            action = self.plan.action_of(info.scope)
            tier = {Action.HOST: Tier.HOST, Action.DISK: Tier.DISK}.get(action)
            if tier is None and _block_of(info.scope, self._blocks) is None:
                return False
            if action is not Action.RECOMPUTE and not in_backward():
                self._make_room(info.storage_nbytes, info.device, tier is not None)
            return tier or self._too_large
        if self._samples.taking and not in_backward():
            name = _block_of(info.scope, self._blocks)
            if name is not None:
                self._samples.note(name, info.storage_nbytes)
        return self._trial is None or _treated(self._trial, info.scope) is Action.DISK

    def _make_room(self, nbytes: int, device: torch.device, moves: bool) -> None:
        """A block saves a storage: others that are on their way out may have to leave before."""
        room, cache = self._room, self._cache()
        if room is None or cache is None:
            return
        if self._before is None:
            self._before = cache.held.here_nbytes
        self._behind = 0 if moves else self._behind + nbytes
        most = room.most_bytes if moves else room.before_next(self._behind)
        cache.make_room(int(self._before + most) - nbytes, device)

    @property
    def _too_large(self) -> bool:
        """Whether a call was so large that what the plan keeps would exceed the budget."""
        if self._budget is None or self.forecast is None or self.plan is None or not self.plan.fits:
            return False
        return self._share > 1 and self._share * self.forecast.peak_bytes > self._budget

    @property
    def _share(self) -> float:
        """The largest call of the step under way over that of the steps planned for."""
        return self.likeness.largest / max(self._largest, 1)

    def called(self, args: Any, kwargs: Any, cache: Any) -> None:
        """The model is called."""
        self.likeness.called(args, kwargs)
        if self.plan is None:
            self._rounds.called(cache)

    def begin_step(self, cache: Any) -> None:
        """A `with` block begins."""
        self.leave()  # what an interrupt in the middle of a beginning left on
        self._changes.forget()
        cache.poll()
        self._cache = weakref.ref(cache)  # which has this policy
        self._before = None
        if self._num_steps == _WARM_UP_STEPS and self._profiler is None and not self._blind:
            self._begin_trials(cache)
        if self._profiler is not None and self.plan is None:
            self._set_trials()
            self._trial = self._trials[self._profiler.num_steps]
            self._profiler.begin()
        moves_all = self._trial is not None and set(self._trial.values()) == {Action.DISK}
        self._samples.begin(
            cache.account.by_module, moves_all or self._num_steps == _WARM_UP_STEPS - 1
        )
        if self._num_steps < _WARM_UP_STEPS and self._budget is not None:
            for name, block in self._blocks.items():
                if not is_compiled(block):  # which would be compiled anew
                    self._forwards.wrap(block, self._changes.watching(name, block))
        for name, action in self._actions().items():
            if action is Action.RECOMPUTE:
                self._forwards.wrap(self._blocks[name], checkpoint)
        self.likeness.begin()
        self._rounds.begin(cache)
        self._new_before = cache.new_nbytes
        if self._followed is not None:
            self._followed.begin(cache, self._tiers.moment(self._device()))

    def end_step(self, cache: Any) -> None:
        """A `with` block ends, with its backward."""
        if self._followed is not None:
            self._followed.end(cache, self._tiers.moment(self._device()), self.likeness)
            self._look_at(cache.held.recent_peak, cache)
            return
        self._changed |= self._changes.found()
        saved = cache.new_nbytes > self._new_before
        if not (self.likeness.trains and (saved if self._profiler is None else self._profiler.ran)):
            return
        self._num_steps += 1
        self._rounds.end(cache)
        self._samples.end(cache.account.by_module, self._rounds.num, self.likeness)
        if self._profiler is not None:
            assert self._trial is not None
            self._profiler.end(self._trial, self._rounds.num)
            self.likeness.learn()
            # The last step of an epoch may have fewer rounds, and not every step a penalty.
            self._nums_of_rounds.append(self._rounds.num)
            self._num_rounds = statistics.mode(self._nums_of_rounds)
            self.again_bytes = max(self.again_bytes, self._rounds.again_nbytes)
            if self._profiler.num_steps == len(self._trials):
                self._profiler.remove()
                self._trial = None
                self._make_plan(self._profiler, cache)

    def _look_at(self, peak_nbytes: int, cache: Any) -> None:
        """Whether what a step under the plan held is what the plan was to keep within."""
        if self._budget is None or self.plan is None or not self.plan.fits:
            return
        anew = False
        if self._too_large:
            if not self._said_larger:
                self._said_larger = True
                self._warn(plan_warnings.of_size(self._budget, self._share, peak_nbytes))
            self._num_large += 1
            anew = self._num_large == _LARGE_STEPS and self._num_plans < _MOST_PLANS
        elif self.likeness.trains:
            self._num_large = 0
            if peak_nbytes > _EXCESS * self._budget and self._num_plans < _MOST_PLANS:
                self._warn(plan_warnings.of_excess(self._budget, peak_nbytes))
                anew = True
        if anew:
            self._num_plans += 1
            cache.set_budgets(self._given)
            self._start(_WARM_UP_STEPS - 1)

    def _begin_trials(self, cache: Any) -> None:
        planned = self._take(self._samples.largest().modules)
        if self.other_bytes and not planned and not self._run_again_anyway(cache):
            self._blind = True
            self._warn(plan_warnings.of_blindness(self._blocks))
            return
        if self._changed:
            self._warn(plan_warnings.of_changes(self._changed, len(self._blocks)))
        if self._budget is not None:
            others = set(self._changed) | self._run_again_anyway(cache)
            self._again = set(self._blocks) - others
        self._profiler = BlockProfiler(self._blocks, self._device(), self._exclusions)
        self._profiler.install(cache.exposed_wait_s)

    def _set_trials(self) -> None:
        """Has as many blocks kept as fit, with inputs as large as any so far."""
        planned, num = self._take(self._samples.largest().modules), len(self._blocks)
        num_kept = num // (2 if self._again else 4)
        if self._budget is not None and planned:
            assert self._profiler is not None
            block = planned / num
            beside = self.other_bytes + _IN_FLIGHT_BLOCKS * block
            if len(self._again) == num:
                beside = self.other_bytes + block + self._profiler.inputs_nbytes
            room = self._budget - beside
            num_kept = max(0, min(num_kept, int(room / block)))
        num_steps = (3 if self._again else 2) * _STEPS_OF_A_KIND
        self._trials = trials(list(self._blocks), num_kept, self._again, num_steps)

    def _take(self, saved: dict[str, ModuleBytes]) -> int:
        """Plans for steps that save this; returns the bytes that the blocks do."""
        self._saved = saved
        of_blocks = sum(
            account.bytes_saved
            for scope, account in saved.items()
            if _block_of(scope, self._blocks) is not None
        )
        self.other_bytes = sum(account.bytes_saved for account in saved.values()) - of_blocks
        return of_blocks

    def _run_again_anyway(self, cache: Any) -> set[str]:
        """The blocks that a checkpoint of the model's own runs again in backward."""
        scopes = [scope for scope, account in self._saved.items() if account.bytes_again]
        again = {name for name in self._blocks if any(inside(scope, name) for scope in scopes)}
        outer = cache.checkpointed
        return again | {n for n in self._blocks if any(inside(n, module) for module in outer)}

    def _actions(self) -> Mapping[str, Action]:
        """What is done with each block in the step that begins."""
        if self.plan is None:
            return self._trial or {}
        return {p.name: a for p, a in zip(self.plan.profiles, self.plan.actions, strict=True)}

    def leave(self) -> None:
        """Takes recomputation off the model, which may be copied or saved between steps."""
        self._forwards.give_back()

    def remove(self) -> None:
        """Takes everything off the model."""
        self.leave()
        if self._profiler is not None:
            self._profiler.remove()

    def explain(self) -> str:
        """The plan as a table, and what was measured since."""
        if self._blind:
            return "No plan: none of what the model saved was saved by its blocks. All is moved."
        if self.plan is None:
            return (
                f"No plan yet: {_WARM_UP_STEPS} steps warm up, "
                f"{_STEPS_OF_A_KIND} of each kind are measured, {self._num_steps} are done."
            )
        assert self.forecast is not None and self._followed is not None
        lines = [str(self.plan)]
        if self.other_bytes:
            lines.append(f"outside these modules: {self.other_bytes / 2**20:.1f} MiB are kept")
        if self.again_bytes:
            lines.append(f"saved by backward itself: {self.again_bytes / 2**20:.1f} MiB are kept")
        if self._num_rounds > 1:
            lines.append(f"so much in each of {self._num_rounds} rounds of a step")
        return "\n".join([*lines, *self._followed.explain(self.forecast)])

    def _make_plan(self, profiler: BlockProfiler, cache: Any) -> None:
        # Inputs may differ from step to step: the bytes are those of a step of the usual load.
        sample = self._samples.nearest(self.likeness.median)
        self._take(sample.modules)
        self._largest = sample.largest
        profiles = profiler.profiles(self._saved)
        for i, profile in enumerate(profiles):
            profiles[i] = replace(profile, parts=sample.parts.get(profile.name, ()))
            if profile.name in self._changed:
                profiles[i] = replace(profiles[i], input_bytes=None)
        rates = self._tiers.measure(self._device())
        self._followed = Followed(cache.exposed_wait_s())
        self._follow(plan_in(self._setting(rates, profiler.other_s()), profiles), cache)
        assert self.plan is not None
        if self.plan.keep_bytes and not profiler.saw_backward:
            self._warn(plan_warnings.of_no_backward())
        if not self.plan.fits:
            assert self._budget is not None and self.forecast is not None
            self._warn(plan_warnings.of_no_plan(self._budget, self.forecast.peak_bytes))

    def _setting(self, rates: dict[Tier, TierRate], other_s: float) -> Setting:
        """What the plan of one round is made for."""
        return Setting(
            {_ACTION_OF[tier]: rate for tier, rate in rates.items()},
            None if self._budget is None else max(0.0, self._budget - self.again_bytes),
            self._given,
            other_s,
            self.other_bytes,
        )

    def _follow(self, made: Windowed, cache: Any) -> None:
        """Sets what may be on its way, and foresees a step of all its rounds."""
        self.plan, of_round = made.plan, made.forecast
        self._room = made.room
        cache.set_budgets(made.budgets)
        self.forecast = replace(
            of_round,
            step_s=of_round.step_s * self._num_rounds,
            exposed_s=of_round.exposed_s * self._num_rounds,
            peak_bytes=of_round.peak_bytes + self.again_bytes,
            seen_bytes=of_round.seen_bytes + self.again_bytes,
            prompt_bytes=of_round.prompt_bytes + self.again_bytes,
        )

    def _device(self) -> torch.device:
        """Where the model begins."""
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    @staticmethod
    def _warn(text: str) -> None:
        # Said in the `__enter__` or `__exit__` of a block, two calls deep: to whose line it is.
        warnings.warn(f"activation offload: {text}", RuntimeWarning, stacklevel=5)


def _treated(trial: Mapping[str, Action], scope: str) -> Action | None:
    """What is done with the block that `scope` lies in; None outside of them."""
    name = _block_of(scope, trial)
    return None if name is None else trial[name]


def _block_of(scope: str, blocks: Container[str]) -> str | None:
    """The name of the block that `scope` lies in; None outside of them."""
    while scope not in blocks and scope:
        scope = scope.rpartition(".")[0]
    return scope if scope in blocks else None
