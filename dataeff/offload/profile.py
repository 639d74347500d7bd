"""Measures the blocks of a model during a few ordinary steps: seconds, bytes, inputs."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from dataeff.offload.exclude import Exclusions, storages_of
from dataeff.offload.module_hook import ModuleHook
from dataeff.offload.planner import Action, ModuleProfile
from dataeff.offload.report import ModuleBytes
from dataeff.offload.scopes import is_compiled, outside_compiled

Trial = Mapping[str, Action]  # what was done with each block in a step; DISK: moved to any tier
Times = dict[str, tuple[float, float]]  # seconds of forward and backward by block


_LEAST_SHARE = 0.1  # of the parameters of the largest list, for one beside it to be planned


def trials(
    names: Sequence[str], num_kept: int, again: Set[str], num_steps: int
) -> list[dict[str, Action]]:
    """What to do with the blocks in each measured step: one thing with all of them, in turn.

    Moved, recomputed (those in `again`, if there are any; the others are moved meanwhile), and
    kept: only as many of them as `num_kept` says, others each time; the rest is recomputed then, or
    moved. In a step of all kinds the transfers of one block would be charged to the next.
    """
    rest = {name: Action.RECOMPUTE if name in again else Action.DISK for name in names}
    kinds = [Action.DISK, *([Action.RECOMPUTE] if again else []), Action.KEEP]
    found = []
    for step in range(num_steps):
        kind = kinds[step % len(kinds)]
        trial = dict.fromkeys(names, Action.DISK) if kind is Action.DISK else dict(rest)
        if kind is Action.KEEP:
            first = step * len(names) // num_steps
            for i in range(num_kept):
                trial[names[(first + i) % len(names)]] = Action.KEEP
        found.append(trial)
    return found


def find_blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules to plan for: the children of the list that holds most of the parameters.

    The layers of a transformer are such a list; an encoder and a decoder are two: a list beside it
    with at least a tenth as many parameters counts as well. A model without a list is planned by
    its children, and one without children, or compiled as a whole, as a whole.

    Raises:
        ValueError: a block is scripted: it takes no hooks, and does not run again.
    """
    sizes: dict[str, tuple[int, torch.nn.Module]] = {
        name: (sum(p.numel() for p in module.parameters() if not is_lazy(p)), module)
        for name, module in outside_compiled(model)
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential))
        and len(module) > 1
        and not is_compiled(module)
    }
    largest = max((size for size, _ in sizes.values()), default=0)
    chosen: list[str] = []
    for name in sorted(sizes, key=lambda name: -sizes[name][0]):
        beside = not any(_nested(name, other) or _nested(other, name) for other in chosen)
        if beside and (not chosen or sizes[name][0] >= _LEAST_SHARE * largest):
            chosen.append(name)
    parents = {name: parent for name, (_, parent) in sizes.items() if name in chosen} or {"": model}
    children = {
        f"{name}.{child}" if name else child: module
        for name, parent in parents.items()
        if not is_compiled(parent)
        for child, module in parent.named_children()
    }
    blocks = children or {"": model}
    for name, block in blocks.items():
        if isinstance(block, torch.jit.ScriptModule):
            raise ValueError(
                f"policy='auto': block {name!r} is scripted, which cannot be timed or recomputed; "
                "choose another policy, or do not script it"
            )
    return blocks


def _nested(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


class BlockProfiler:
    """Notes when each block's forward begins and ends and when its backward begins.

    The backward of a block is taken to last until the next thing noted: in a chain of blocks, the
    backward of the one before it. Waits for transfers (`exposed_s`) are taken off. At each note the
    host waits for the compute stream, so profiled steps are slower, and only those.

    Each step is told what was done with each block in it (`Trial`): what moving and recomputing
    add to a block is measured and not assumed.

    Args:
        blocks: by their names.
        device: where they are.
        exclusions: knows what is alive anyway: parameters, buffers, inputs of the model.
    """

    def __init__(
        self, blocks: Mapping[str, torch.nn.Module], device: torch.device, exclusions: Exclusions
    ) -> None:
        self._blocks, self._device, self._exclusions = blocks, device, exclusions
        self._notes: list[tuple[float, float, str, str]] = []
        self._steps: list[tuple[Trial, dict[tuple[str, str], float], float]] = []
        self._input_bytes = defaultdict[str, list[int]](list)  # of one round, step by step
        self._inputs: dict[str, int] = {}  # the same, of the step under way
        # Storages of inputs counted in it: one given to several blocks is the first's.
        self._counted: dict[int, StorageWeakRef] = {}
        self._hooks: list[Any] = []

    def install(self, exposed_s: Any) -> None:
        """Begins to note; `exposed_s()` is the time waited for transfers so far."""
        self._exposed_s = exposed_s
        for name, block in self._blocks.items():
            enter, leave = ModuleHook(self._on_enter(name)), ModuleHook(self._on_leave(name))
            if getattr(block, "_compiled_call_impl", None) is not None:
                self._hooks.append(_AroundCompiled(block, enter, leave))
                continue
            self._hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            self._hooks.append(block.register_forward_hook(leave))

    def remove(self) -> None:
        """Stops noting."""
        while self._hooks:
            self._hooks.pop().remove()

    def begin(self) -> None:
        """A step begins."""
        self._forget()  # one that was not ended
        self._note("between", "")

    def end(self, trial: Trial, num_rounds: int = 1) -> None:
        """Backward, or the step, is over: what was noted last ends here.

        Of a step of several rounds, what each took on average is entered.
        """
        self._note("end", "")
        seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        for (t0, e0, kind, name), (t1, e1, _, _) in zip(self._notes, self._notes[1:], strict=False):
            seconds[kind, name] += max(0.0, (t1 - t0) - (e1 - e0)) / num_rounds
        (t0, e0, _, _), (t1, e1, _, _) = self._notes[0], self._notes[-1]
        self._steps.append((trial, dict(seconds), ((t1 - t0) - (e1 - e0)) / num_rounds))
        for name, nbytes in self._inputs.items():
            self._input_bytes[name].append(nbytes // num_rounds)
        self._forget()

    def _forget(self) -> None:
        self._notes.clear()
        self._inputs.clear()
        self._counted.clear()

    @property
    def ran(self) -> bool:
        """Whether a block has run in the step under way."""
        return len(self._notes) > 1

    @property
    def saw_backward(self) -> bool:
        """Whether the backward of a block has begun in any step."""
        return any(kind == "backward" for _, seconds, _ in self._steps for kind, _ in seconds)

    @property
    def num_steps(self) -> int:
        """Steps measured so far."""
        return len(self._steps)

    @property
    def inputs_nbytes(self) -> int:
        """Bytes of the inputs of all blocks, the most of any step."""
        return sum(map(max, self._input_bytes.values()))

    def profiles(self, saved: Mapping[str, ModuleBytes]) -> list[ModuleProfile]:
        """Medians over the steps, with the bytes that each module saved in one round."""
        moved, again = self._times(Action.DISK), self._times(Action.RECOMPUTE)
        base = self._kept(again or moved, Action.RECOMPUTE if again else Action.DISK)
        moving = _ratio(moved, base)
        for name, (forward_s, backward_s) in moved.items():  # of those that are never recomputed
            base.setdefault(name, (forward_s / moving, backward_s / moving))
        times_again = _added_per_forward(again, base)
        found = []
        # In the order of forward, which that of registration need not be.
        for name in dict.fromkeys([*self._input_bytes, *self._blocks]):
            forward_s, backward_s = base.get(name, (0.0, 0.0))
            inputs = self._input_bytes.get(name)
            accounts = [account for scope, account in saved.items() if inside(scope, name)]
            saved_bytes = sum(account.bytes_saved for account in accounts)
            stored_bytes = sum(account.bytes_stored for account in accounts)
            again_bytes = sum(account.bytes_again for account in accounts)
            left_bytes = sum(account.bytes_left for account in accounts)
            found.append(
                ModuleProfile(
                    name,
                    forward_s,
                    backward_s,
                    saved_bytes,
                    None if again_bytes or not inputs else int(statistics.median(inputs)),
                    saved_bytes - stored_bytes,
                    (moving - 1) * (forward_s + backward_s),
                    times_again * forward_s if again else None,
                    again_bytes,
                    left_bytes,
                )
            )
        return found

    def _kept(self, rest: Times, rest_is: Action) -> Times:
        """Seconds of every block when it is kept, from its seconds in `rest`.

        Of the steps in which some blocks were kept, and the others treated as in `rest`, each tells
        how much faster keeping is beside how fast that very step was: a machine that was slow for a
        while slowed both. What counts is the median of these steps.
        """
        if not any(trial[name] is Action.KEEP for trial, _, _ in self._steps for name in rest):
            # Where memory was too small to keep anything, moving is what there is to start from.
            return self._times(Action.DISK) or rest
        forward, backward = (self._how_much_faster(rest, rest_is, way) for way in (0, 1))
        return {name: (t[0] * forward, t[1] * backward) for name, t in rest.items()}

    def _how_much_faster(self, rest: Times, rest_is: Action, way: int) -> float:
        """Seconds of forward (0) or backward (1) when kept over those in `rest`."""
        kind = ("forward", "backward")[way]
        usual = {name: times[way] for name, times in rest.items()}
        ratios = []
        for trial, seconds, _ in self._steps:
            now = {name: seconds.get((kind, name), 0.0) for name in usual}
            kept, others = (
                {name for name in usual if trial[name] is action}
                for action in (Action.KEEP, rest_is)
            )
            if mine := _over(now, usual, kept):
                ratios.append(mine / (_over(now, usual, others) or 1.0))
        return statistics.median(ratios) if ratios else 1.0

    def other_s(self) -> float:
        """Seconds of a step outside the blocks: embedding, head, loss, whatever stands between."""
        inside = [
            sum(s for (kind, _), s in seconds.items() if kind in ("forward", "backward"))
            for _, seconds, _ in self._steps
        ]
        pairs = zip(self._steps, inside, strict=True)
        return max(0.0, statistics.median(total_s - s for (_, _, total_s), s in pairs))

    def _times(self, action: Action) -> Times:
        """Seconds of forward and backward of the blocks that were treated like this.

        Medians of each block, in the sum stretched to the median step: what disturbs a step falls
        on one block in this and on another in the next, and no block's median shows it.
        """
        steps = [(trial, seconds) for trial, seconds, _ in self._steps]
        found: Times = {}
        for name in self._blocks:
            of_name = [seconds for trial, seconds in steps if trial[name] is action]
            if of_name:
                forward_s, backward_s = (
                    statistics.median(seconds.get((kind, name), 0.0) for seconds in of_name)
                    for kind in ("forward", "backward")
                )
                found[name] = forward_s, backward_s
        paces = []
        for trial, seconds in steps:
            names = [name for name in found if trial[name] is action]
            if names:
                both = [(kind, name) for kind in ("forward", "backward") for name in names]
                usual_s = sum(sum(found[name]) for name in names)
                paces.append(sum(seconds.get(key, 0.0) for key in both) / max(usual_s, 1e-12))
        pace = statistics.median(paces) if paces else 1.0
        return {name: (pace * t[0], pace * t[1]) for name, t in found.items()}

    def _note(self, kind: str, name: str) -> None:
        if self._device.type == "cuda":
            # Not the device: what is copied beside the block is no part of it, until compute waits.
            torch.cuda.current_stream(self._device).synchronize()
        self._notes.append((time.perf_counter(), self._exposed_s(), kind, name))

    def _on_enter(self, name: str) -> Any:
        def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self._count_inputs(name, tensors)
            self._note("forward", name)

        return enter

    def _count_inputs(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        nbytes = 0
        for storage in storages_of(tensors):
            if storage in self._exclusions or storage._cdata in self._counted:
                continue
            # The reference keeps the address from being given to another storage.
            self._counted[storage._cdata] = StorageWeakRef(storage)
            nbytes += storage.nbytes()
        self._inputs[name] = self._inputs.get(name, 0) + nbytes

    def _on_leave(self, name: str) -> Any:
        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._note("between", name)
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda grad: self._note("backward", name))
                    break

        return leave


class _AroundCompiled:
    """Hooks around what `module.compile()` made: those of the module would be compiled with it.

    A copy of a module has no compiled call, so it does not inherit these either.
    """

    def __init__(self, block: Any, enter: ModuleHook, leave: ModuleHook) -> None:
        self._block, self._compiled = block, block._compiled_call_impl
        compiled = self._compiled

        def call(*args: Any, **kwargs: Any) -> Any:
            enter(block, args, kwargs)
            output = compiled(*args, **kwargs)
            leave(block, args, output)
            return output

        self._call = block._compiled_call_impl = call

    def remove(self) -> None:
        """Gives the module its compiled call back, unless it was compiled anew."""
        if self._block._compiled_call_impl is self._call:
            self._block._compiled_call_impl = self._compiled


def _over(now: Mapping[str, float], usual: Mapping[str, float], names: Set[str]) -> float:
    """Seconds over the usual ones; 0 where `names` take no time, as blocks without backward."""
    usual_s = sum(usual[name] for name in names)
    return sum(now[name] for name in names) / usual_s if usual_s else 0.0


def _ratio(times: Times, base: Times) -> float:
    """Seconds of `times` over those of `base`, of the blocks that both have."""
    both = times.keys() & base.keys()
    base_s = sum(sum(base[name]) for name in both)
    return sum(sum(times[name]) for name in both) / base_s if base_s else 1.0


def _added_per_forward(times: Times, base: Times) -> float:
    """What `times` adds to `base`, in forwards of the blocks that both have."""
    both = times.keys() & base.keys()
    added_s = sum(sum(times[name]) - sum(base[name]) for name in both)
    forward_s = sum(base[name][0] for name in both)
    return added_s / forward_s if forward_s else 1.0


def inside(scope: str, name: str) -> bool:
    """Whether the module `scope` is the one of that name, or in it."""
    return not name or scope == name or scope.startswith(name + ".")
