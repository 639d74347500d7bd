"""Activation offloading in a `lightning.Trainer`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dataeff.integrations.step_block import StepBlock


class OffloadCallback(StepBlock, Callback):  # type: ignore[misc,unused-ignore]
    """Runs every training batch of a Lightning Trainer under an offload.

    ```python
    callback = OffloadCallback(spill=["/nvme0"])
    Trainer(max_epochs=1, callbacks=[callback]).fit(module, loader)
    print(callback.offload.report())
    ```
    Where a strategy starts the ranks itself (`ddp_spawn`, `ddp_fork`, `ddp_notebook`), each has a
    copy of this callback and an offload of its own, and Lightning brings neither back: `offload` of
    the one that was given stays None. Print the report in an `on_train_end`: that runs in the rank.

    Args:
        **options: of `dataeff.ActivationOffload`, without the model.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the offload for the module that is trained."""
        self._make(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forward and backward follow."""
        # A hook that skips the rest of an epoch has no end of its batch: the next one ends it.
        # And a `training_step` may call parts of the module only.
        self._start().expect_forward(batch)

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
