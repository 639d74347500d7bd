"""How often a step goes through the model: with accumulated gradients, once for each microbatch."""

from __future__ import annotations

from typing import Any

import torch

_CLEAR = 8  # less than this part of what a round saved is left of it when the next begins


class Rounds:
    """Counts forwards that begin when backward has let go of what was saved before.

    What one round saves is gone before the next saves anything, so a step of four rounds holds a
    quarter of the bytes that it saves. Microbatches whose backwards come later are one round.

    Attributes:
        num: of the step under way, so far; at least 1.
    """

    def __init__(self) -> None:
        self.num = 1
        self._saved_before = 0

    def begin(self, cache: Any) -> None:
        """A step begins."""
        self.num, self._saved_before = 1, cache.new_nbytes

    def called(self, cache: Any) -> None:
        """The model is called."""
        if not torch.is_grad_enabled():
            return
        saved = cache.new_nbytes - self._saved_before
        if saved and _CLEAR * cache.wanted_nbytes() < saved:
            self.num += 1
            self._saved_before += saved
