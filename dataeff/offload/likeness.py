"""Which steps are like those that a plan was made from: the others say nothing about it."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_SPREAD = 0.1  # of the usual load, within which a step is like the others


class Likeness:
    """Tells steps by what the model is called with: evaluation, and batches of other sizes.

    The load of a step is the number of elements of the tensors with which the model is called
    while gradients are on. Where the model itself is never called, every step is like the others.

    Attributes:
        load: of the step under way, so far.
        largest: of one call, so far.
    """

    def __init__(self) -> None:
        self._loads: list[int] = []
        self.load = self.largest = self._num_calls = self._num_training = 0

    def begin(self) -> None:
        """A step begins."""
        self.load = self.largest = self._num_calls = self._num_training = 0

    def called(self, args: Any, kwargs: Any) -> None:
        """The model is called."""
        self._num_calls += 1
        if torch.is_grad_enabled():
            self._num_training += 1
            load = sum(
                leaf.numel()
                for leaf in tree_leaves((args, kwargs))
                if isinstance(leaf, torch.Tensor)
            )
            self.load += load
            self.largest = max(self.largest, load)

    @property
    def trains(self) -> bool:
        """Whether the step under way may have a backward."""
        return self._num_training > 0 or self._num_calls == 0

    def learn(self) -> None:
        """The step under way is one that the plan is made from."""
        self._loads.append(self.load)

    @property
    def median(self) -> float:
        """The median load of the steps learnt."""
        return statistics.median(self._loads) if self._loads else 0.0

    @property
    def usual(self) -> bool:
        """Whether the step under way trains, with about the median load of those learnt."""
        return self.trains and abs(self.load - self.median) <= _SPREAD * self.median
