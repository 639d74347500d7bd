"""Steps that need not be looked at, because those like them had nothing to offload.

Hooks cost a few per cent of a small step even when everything stays in memory. Keeping is always
right, so that when nothing has moved for some steps the hooks are left away; what can change that
is watched instead, with one hook on the model: what it is called with. A callable policy may change
its mind: it is asked again, when the model is called, about what such a call had saved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from dataeff.ledger import Tier
from dataeff.offload.policy import Policy, SavedTensorInfo

QUIET_STEPS = 2  # with nothing to move, one after another, before the first is not looked at
LOOK_EVERY = 64  # steps: sizes may also hang on values, or on code around the model
_MOST_CALLS = 1024
_MOST_ASKED = 1 << 16  # storages that a policy was asked about, of all calls that are known
_PLAIN = (bool, int, float, str, type(None))


class Asked:
    """A callable policy, and what it was asked about.

    Attributes:
        infos: that, since somebody last began another list.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.infos: list[SavedTensorInfo] = []

    def __call__(self, info: SavedTensorInfo) -> bool | Tier:
        """What the policy says."""
        self.infos.append(info)
        return self._policy(info)

    def keeps(self, infos: list[SavedTensorInfo]) -> bool:
        """Whether it would keep all of these now."""
        return not any(answer and answer != Tier.DEVICE for answer in map(self._policy, infos))


class Rest:
    """Decides which steps are looked at.

    Args:
        asked: the policy, if it may change its mind.

    Attributes:
        resting: whether the step under way is not.
        num_steps: steps that were not.
    """

    def __init__(self, asked: Asked | None = None) -> None:
        self.resting = False
        self.num_steps = 0
        self._asked = asked
        # Calls of the model with which nothing had to move, and those of the step under way; of
        # each, what the policy was asked about after it.
        self._quiet: dict[Hashable, list[SavedTensorInfo]] = {}
        self._calls: dict[Hashable, list[SavedTensorInfo]] = {}
        self._before: list[SavedTensorInfo] = []  # what it was asked about before any call
        self._num_quiet = self._since = 0
        self._woken = self._allowed = False

    def begin(self, allowed: bool) -> None:
        """A step begins."""
        self._calls.clear()
        self._before = self._listen()
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
        if self.resting and not self._woken:
            known = self._quiet.get(call)
            self._woken = known is None or not (self._asked is None or self._asked.keeps(known))
        self._calls[call] = self._listen()
        return self._woken

    def end(self, num_moved: int) -> None:
        """A step has ended well, in which so many storages were moved."""
        if self.resting and not self._woken:
            self.num_steps += 1
            self._since += 1
        elif num_moved or self._before or self.resting or not self._calls or not self._allowed:
            # Where the model itself is never called, nothing would tell that its inputs changed.
            self._num_quiet = self._since = 0
            for call in self._calls:
                self._quiet.pop(call, None)
        else:
            self._num_quiet += 1
            self._since = 0
            self._quiet |= self._calls
            num_asked = sum(map(len, self._quiet.values()))
            if len(self._quiet) > _MOST_CALLS or num_asked > _MOST_ASKED:
                self._quiet = dict(self._calls)

    def _listen(self) -> list[SavedTensorInfo]:
        """The list of what the policy is asked about from here on."""
        infos = list[SavedTensorInfo]()
        if self._asked is not None:
            self._asked.infos = infos
        return infos


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
