"""Train an MLP with lightning.Trainer, its activations on disk instead of in memory.

    python examples/train_lightning_offload.py --spill /nvme0

The callback is all that is added; the weights come out bit for bit as without it (`--keep`).
"""

import argparse
import tempfile

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F

from dataeff.integrations.lightning import OffloadCallback


class Classifier(pl.LightningModule):
    def __init__(self, width: int, depth: int):
        super().__init__()
        hidden = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.GELU())]
        self.net = nn.Sequential(nn.Linear(64, width), *hidden, nn.Linear(width, 10))

    def training_step(self, batch, index):
        x, label = batch
        return F.cross_entropy(self.net(x), label)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(argv: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spill", default=tempfile.gettempdir(), help="on a fast disk")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--keep", action="store_true", help="keep activations, to compare")
    args = parser.parse_args(argv)
    width, depth, batch = (64, 2, 128) if args.tiny else (1024, 12, 8192)

    torch.manual_seed(0)
    x = torch.randn(args.steps * batch, 64)
    data = torch.utils.data.TensorDataset(x, x[:, :10].argmax(1))
    module = Classifier(width, depth)
    callback = OffloadCallback(spill=[args.spill], min_bytes=1 << 14)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[] if args.keep else [callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=batch))
    if callback.offload is not None:
        print(callback.offload.report())
    return module


if __name__ == "__main__":
    main()
