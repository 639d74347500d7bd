"""The block around a step of a trainer, which tells its callbacks when a step begins and ends."""

from __future__ import annotations

from typing import Any

import torch

from dataeff.offload import ActivationOffload


class StepBlock:
    """Begins and ends the block of an offload where no `with` can stand.

    Args:
        **options: of `dataeff.ActivationOffload`, without the model.

    Attributes:
        offload: of the model that is trained, or was last; None before.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.offload: ActivationOffload | None = None

    def _make(self, model: torch.nn.Module) -> None:
        """Makes the offload of `model`, in the place of another's."""
        self._close()
        self.offload = ActivationOffload(model, **self._options)

    def _start(self) -> ActivationOffload:
        """Begins a block; ends the last one if nobody did."""
        self._stop()
        assert self.offload is not None
        return self.offload.__enter__()

    def _stop(self, *error: Any) -> None:
        """Ends the block under way, if one is."""
        if self.offload is not None:
            self.offload.__exit__(*(error or (None, None, None)))

    def _close(self, *error: Any) -> None:
        """Ends the block under way and gives the files back."""
        self._stop(*error)
        if self.offload is not None:
            self.offload.close()
