"""Measures the blocks of a model during a few ordinary steps: seconds, bytes, inputs."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dataeff.offload.planner import ModuleProfile
from dataeff.offload.report import ModuleBytes


def find_blocks(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules to plan for: the children of the list that holds most of the parameters.

    The layers of a transformer are such a list. A model without one is planned by its children.
    """
    lists: list[tuple[str, torch.nn.Module]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)) and len(module) > 1
    ]
    name, parent = max(
        [*lists] or [("", model)], key=lambda pair: sum(p.numel() for p in pair[1].parameters())
    )
    prefix = f"{name}." if name else ""
    return {prefix + child: module for child, module in parent.named_children()}


class BlockProfiler:
    """Notes when each block's forward begins and ends and when its backward begins.

    The backward of a block is taken to last until the next thing noted: in a chain of blocks, the
    backward of the one before it. Waits for transfers (`exposed_s`) are taken off. The device is
    synchronised at each note, so profiled steps are slower, and only those.
    """

    def __init__(self, blocks: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._notes: list[tuple[float, float, str, str]] = []
        self._steps: list[dict[tuple[str, str], float]] = []
        self._totals_s: list[float] = []
        self._input_bytes: dict[str, int] = {}
        self._hooks: list[Any] = []

    def install(self, exposed_s: Any) -> None:
        """Begins to note; `exposed_s()` is the time waited for transfers so far."""
        self._exposed_s = exposed_s
        for name, block in self._blocks.items():
            self._hooks.append(
                block.register_forward_pre_hook(self._on_enter(name), with_kwargs=True)
            )
            self._hooks.append(block.register_forward_hook(self._on_leave(name)))

    def remove(self) -> None:
        """Stops noting."""
        while self._hooks:
            self._hooks.pop().remove()

    def end(self) -> None:
        """Backward, or the step, is over: what was noted last ends here."""
        self._note("end", "")
        seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        for (t0, e0, kind, name), (t1, e1, _, _) in zip(self._notes, self._notes[1:], strict=False):
            seconds[kind, name] += max(0.0, (t1 - t0) - (e1 - e0))
        self._steps.append(dict(seconds))
        (t0, e0, _, _), (t1, e1, _, _) = self._notes[0], self._notes[-1]
        self._totals_s.append((t1 - t0) - (e1 - e0))
        self._notes.clear()

    @property
    def num_steps(self) -> int:
        """Steps measured so far."""
        return len(self._steps)

    def profiles(self, saved: Mapping[str, ModuleBytes]) -> list[ModuleProfile]:
        """Medians over the steps, with the bytes that each module saved during all of them."""
        return [self._profile(name, saved) for name in self._blocks]

    def other_s(self, profiles: Sequence[ModuleProfile]) -> float:
        """Seconds of a step outside the blocks: embedding, head, loss, whatever stands between."""
        inside = sum(p.forward_s + p.backward_s for p in profiles)
        return max(0.0, statistics.median(self._totals_s) - inside)

    def _profile(self, name: str, saved: Mapping[str, ModuleBytes]) -> ModuleProfile:
        forward_s, backward_s = (
            statistics.median(step.get((kind, name), 0.0) for step in self._steps)
            for kind in ("forward", "backward")
        )
        inside = [account for scope, account in saved.items() if _inside(scope, name)]
        saved_bytes = sum(account.bytes_saved for account in inside) // self.num_steps
        stored_bytes = sum(account.bytes_stored for account in inside) // self.num_steps
        return ModuleProfile(
            name,
            forward_s,
            backward_s,
            saved_bytes,
            self._input_bytes.get(name),
            saved_bytes - stored_bytes,
        )

    def begin(self) -> None:
        """A step begins."""
        self._note("between", "")

    def _note(self, kind: str, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._notes.append((time.perf_counter(), self._exposed_s(), kind, name))

    def _on_enter(self, name: str) -> Any:
        def enter(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            self._input_bytes[name] = sum(t.numel() * t.element_size() for t in tensors)
            self._note("forward", name)

        return enter

    def _on_leave(self, name: str) -> Any:
        def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._note("between", name)
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda grad: self._note("backward", name))
                    break

        return leave


def _inside(scope: str, name: str) -> bool:
    return scope == name or scope.startswith(name + ".")
