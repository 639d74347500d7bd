"""Activation offloading in a `transformers.Trainer`."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback

from dataeff.offload import ActivationOffload


class OffloadCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
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

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._active = False
        self.offload: ActivationOffload | None = None

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
        self._close()
        self.offload = ActivationOffload(model, **self._options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Forward and backward follow."""
        self._stop()
        assert self.offload is not None
        self.offload.__enter__()
        self._active = True

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The optimizer has stepped."""
        self._stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Gives the files back; `offload.report()` can still be read."""
        self._close()

    def _stop(self, *error: Any) -> None:
        """Ends the step under way, if one is."""
        if self._active and self.offload is not None:
            self._active = False
            self.offload.__exit__(*(error or (None, None, None)))

    def _close(self, *error: Any) -> None:
        self._stop(*error)
        if self.offload is not None:
            self.offload.close()
