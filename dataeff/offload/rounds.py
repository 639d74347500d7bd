"""How often a step goes through the model: with accumulated gradients, once for each microbatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_CLEAR = 8  # less than this part of what a round saved is left of it when the next begins


class Rounds:
    """Counts forwards that begin when backward has let go of what was saved before.

    What one round saves is gone before the next saves anything, so a step of four rounds holds a
    quarter of the bytes that it saves. Microbatches whose backwards come later are one round.

    Args:
        planned: whether what a module saves, by its name, is planned.

    Attributes:
        num: of the step under way, so far; at least 1.
        again_nbytes: the most that the backward of one of them saved which is not planned: with
            `create_graph=True`, it is held for the backward of that.
    """

    def __init__(self, planned: Callable[[str], bool]) -> None:
        self.num = 1
        self.again_nbytes = 0
        self._planned = planned
        self._saved_before = self._again_before = 0

    def begin(self, cache: Any) -> None:
        """A step begins."""
        self.num, self._saved_before = 1, cache.new_nbytes
        self.again_nbytes, self._again_before = 0, self._again(cache)

    def called(self, cache: Any) -> None:
        """The model is called."""
        if not torch.is_grad_enabled():
            return
        saved = cache.new_nbytes - self._saved_before
        if saved and _CLEAR * cache.wanted_nbytes() < saved:
            self.num += 1
            self._saved_before += saved
            self.end(cache)

    def end(self, cache: Any) -> None:
        """A round ends, with its backward."""
        again = self._again(cache)
        self.again_nbytes = max(self.again_nbytes, again - self._again_before)
        self._again_before = again

    def _again(self, cache: Any) -> int:
        modules = cache.account.by_module.items()
        return sum(account.bytes_again for name, account in modules if not self._planned(name))
