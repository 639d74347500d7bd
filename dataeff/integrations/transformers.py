"""Activation offloading in a `transformers.Trainer`."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

from dataeff.integrations.step_block import StepBlock


class OffloadCallback(StepBlock, TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Runs every training step of a Trainer, gradient accumulation included, under an offload.

    ```python
    with OffloadCallback(spill=["/nvme0"]) as callback:
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    print(callback.offload.report())
    ```
    An exception or Ctrl-C in a step ends training without the Trainer telling its callbacks: the
    `with` block then ends the step, so that nothing trained later on that thread is moved, and
    gives the files back. Without the block the next `train()` does.

    Args:
        **options: of `dataeff.ActivationOffload`, without the model.
    """

    def __enter__(self) -> OffloadCallback:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(kind, error, traceback)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: torch.nn.Module, **others: Any
    ) -> None:
        """Makes the offload for the model that is trained."""
        self._make(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Forward and backward follow."""
        self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The optimizer has stepped."""
        self._stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Gives the files back; `offload.report()` can still be read."""
        self._close()
