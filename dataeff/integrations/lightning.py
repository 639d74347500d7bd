"""Activation offloading in a `lightning.Trainer`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dataeff.offload import ActivationOffload


class OffloadCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Runs every training batch of a Lightning Trainer under an offload.

    ```python
    callback = OffloadCallback(spill=["/nvme0"])
    Trainer(max_epochs=1, callbacks=[callback]).fit(module, loader)
    print(callback.offload.report())
    ```

    Args:
        **options: of `dataeff.ActivationOffload`, without the model.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._active = False
        self.offload: ActivationOffload | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the offload for the module that is trained."""
        self.offload = ActivationOffload(pl_module, **self._options)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forward and backward follow."""
        self._stop()  # a hook that skips the rest of an epoch has no end of its batch
        assert self.offload is not None
        self.offload.__enter__()
        self._active = True
        self.offload.expect_forward(batch)  # a `training_step` may call parts of the module only

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The batch is done."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leaves no hook behind and gives the files back: nothing is torn down after it."""
        self._close(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the files back; `offload.report()` can still be read."""
        self._close()

    def _stop(self, *error: Any) -> None:
        """Ends the batch under way, if one is."""
        if self._active and self.offload is not None:
            self._active = False
            self.offload.__exit__(*(error or (None, None, None)))

    def _close(self, *error: Any) -> None:
        self._stop(*error)
        if self.offload is not None:
            self.offload.close()
