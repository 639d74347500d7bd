"""Activation offloading in a `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from dataeff.offload import ActivationOffload


class OffloadCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Runs every training step of a Trainer, gradient accumulation included, under an offload.

    ```python
    callback = OffloadCallback(spill=["/nvme0"])
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    print(callback.offload.report())
    ```
    An exception in a step ends training without the Trainer telling its callbacks: call `stop()`
    before anything else is trained on that thread.

    Args:
        **options: of `dataeff.ActivationOffload`, without the model.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._active = False
        self.offload: ActivationOffload | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, **others: Any
    ) -> None:
        """Makes the offload for the model that is trained."""
        self.stop()
        if self.offload is not None:
            self.offload.close()
        self.offload = ActivationOffload(model, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Forward and backward follow."""
        self.stop()
        assert self.offload is not None
        self.offload.__enter__()
        self._active = True

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The optimizer has stepped."""
        self.stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Gives the files back; `offload.report()` can still be read."""
        self.stop()
        if self.offload is not None:
            self.offload.close()

    def stop(self) -> None:
        """Ends the step under way, if one is."""
        if self._active and self.offload is not None:
            self._active = False
            self.offload.__exit__(None, None, None)
