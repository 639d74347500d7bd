"""Steps that need not be looked at, because those like them had nothing to offload.

Hooks cost a few per cent of a small step even when everything stays in memory. Keeping is always
right, so that when nothing has moved for some steps the hooks are left away; what can change that
is watched instead, with one hook on the model: what it is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

QUIET_STEPS = 2  # with nothing to move, one after another, before the first is not looked at
LOOK_EVERY = 64  # steps: sizes may also hang on values, or on code around the model
_MOST_CALLS = 1024
_PLAIN = (bool, int, float, str, type(None))


class Rest:
    """Decides which steps are looked at.

    Attributes:
        resting: whether the step under way is not.
        num_steps: steps that were not.
    """

    def __init__(self) -> None:
        self.resting = False
        self.num_steps = 0
        self._quiet: set[Hashable] = set()  # calls of the model with which nothing had to move
        self._calls: set[Hashable] = set()  # those of the step under way
        self._num_quiet = self._since = 0
        self._woken = self._allowed = False

    def begin(self, allowed: bool) -> None:
        """A step begins."""
        self._calls.clear()
        self._woken = False
        self._allowed = allowed
        self.resting = allowed and self._num_quiet >= QUIET_STEPS and self._since < LOOK_EVERY

    def wakes(
        self, model: torch.nn.Module, num_trained: Callable[[], int], args: Any, kwargs: Any
    ) -> bool:
        """The model is called: whether this, in a step at rest, has to be looked at after all.

        Args:
            model: it.
            num_trained: tells how many of its parameters are not frozen.
            args: what it is called with.
            kwargs: the same, by name.
        """
        if not self._allowed:
            return False
        call = num_trained(), _looks_of(model, args, kwargs)
        self._calls.add(call)
        self._woken |= self.resting and call not in self._quiet
        return self._woken

    def end(self, num_decided: int) -> None:
        """A step has ended well, in which so many storages were, or might have been, moved."""
        if self.resting and not self._woken:
            self.num_steps += 1
            self._since += 1
        elif num_decided or self.resting or not self._calls or not self._allowed:
            # Where the model itself is never called, nothing would tell that its inputs changed.
            self._num_quiet = self._since = 0
            self._quiet -= self._calls
        else:
            self._num_quiet += 1
            self._since = 0
            if len(self._quiet) > _MOST_CALLS:
                self._quiet.clear()
            self._quiet |= self._calls


def _looks_of(model: torch.nn.Module, args: Any, kwargs: Any) -> Hashable:
    """What the size of the saved tensors depends on, as far as it shows."""
    leaves: list[Hashable] = [
        model.training,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    ]
    for value in (*args, *kwargs.values()):
        if isinstance(value, (torch.Tensor, *_PLAIN)):  # most are: no tree to climb
            leaves.append(_look_of(value))
        else:
            leaves.extend(map(_look_of, tree_leaves(value)))
    return tuple(leaves)


def _look_of(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        if leaf.is_nested:
            return object()  # like no other: what it saves hangs on more than one size
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    return leaf if isinstance(leaf, _PLAIN) else type(leaf).__qualname__
