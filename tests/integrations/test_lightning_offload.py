"""The callback in a real Lightning Trainer: the same weights, and bytes on disk."""

import os

import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("default")  # the library's own warnings are its own


def make_module():
    class Module(lightning.LightningModule):
        def __init__(self, explode=False):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1))
            self.explode = explode

        def training_step(self, batch, index):
            loss = self.net(batch).square().mean()
            return loss / 0 if self.explode and 1 // 0 else loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module


def fit(callbacks, max_epochs=1, kind=None, **options):
    torch.manual_seed(0)
    module = (kind or make_module())(**options)
    loader = torch.utils.data.DataLoader(torch.randn(256, 64), batch_size=64)
    trainer = lightning.Trainer(
        max_epochs=max_epochs, callbacks=callbacks, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module.state_dict()


def test_fit_gives_the_same_weights(tmp_path):
    from dataeff.integrations.lightning import OffloadCallback

    expected = fit([])
    callback = OffloadCallback(spill=[tmp_path], min_bytes=0)
    got = fit([callback])
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert callback.offload.report().bytes_written > 0


def spill_files(folder):
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [
        at for link in links if os.path.islink(link) and str(folder) in (at := os.readlink(link))
    ]


def test_exception_leaves_no_hook_active_and_no_file_open(tmp_path):
    """Lightning calls `on_exception` then, and no `teardown`."""
    from dataeff.integrations.lightning import OffloadCallback

    callback = OffloadCallback(spill=[tmp_path], min_bytes=0)
    with pytest.raises(ZeroDivisionError):
        fit([callback], explode=True)
    assert spill_files(tmp_path) == []
    before = callback.offload.report().num_packed
    nn.Linear(64, 64)(torch.randn(64, 64)).exp().sum().backward()
    assert callback.offload.report().num_packed == before


def test_an_epoch_whose_rest_is_skipped(tmp_path):
    """`on_train_batch_start` may return -1; Lightning then tells nobody that the batch ended."""
    from dataeff.integrations.lightning import OffloadCallback

    class Skips(make_module()):
        def on_train_batch_start(self, batch, index):
            return -1 if index == 2 else None

    expected = fit([], max_epochs=2, kind=Skips)
    callback = OffloadCallback(spill=[tmp_path], min_bytes=0)
    got = fit([callback], max_epochs=2, kind=Skips)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert callback.offload.report().bytes_written > 0


def test_a_module_whose_parts_alone_are_called(tmp_path):
    """Its batch is known all the same: nothing of it is moved, and steps with nothing rest."""
    from dataeff.integrations.lightning import OffloadCallback

    shapes = set()
    callback = OffloadCallback(
        spill=[tmp_path], min_bytes=0, policy=lambda info: bool(shapes.add(info.shape)) or True
    )
    fit([callback])
    assert shapes == {(64, 256)}  # and not (64, 64)
    callback = OffloadCallback(spill=[tmp_path], min_bytes=1 << 40)
    fit([callback], max_epochs=2)
    report = callback.offload.report()
    assert (report.num_steps, report.num_steps_at_rest) == (8, 6)
