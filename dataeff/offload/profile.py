"""Measures the blocks of a model during one ordinary step: seconds, bytes, inputs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
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
    synchronised at each note, so a profiled step is slower, and only that one.
    """

    def __init__(self, blocks: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._notes: list[tuple[float, float, str, str]] = []
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

    def profiles(self, saved: Mapping[str, ModuleBytes]) -> list[ModuleProfile]:
        """What was measured, with the bytes that each module saved during the step."""
        seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
        for (t0, e0, kind, name), (t1, e1, _, _) in zip(self._notes, self._notes[1:], strict=False):
            seconds[kind, name] += max(0.0, (t1 - t0) - (e1 - e0))
        return [
            ModuleProfile(
                name,
                seconds["forward", name],
                seconds["backward", name],
                sum(b.bytes_saved for scope, b in saved.items() if _inside(scope, name)),
                self._input_bytes.get(name),
            )
            for name in self._blocks
        ]

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
