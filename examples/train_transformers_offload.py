"""Train a GPT-2 with transformers.Trainer, its activations on disk instead of in memory.

    python examples/train_transformers_offload.py --spill /nvme0

The callback is all that is added; the weights come out bit for bit as without it (`--keep`).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from dataeff.integrations.transformers import OffloadCallback


def main(argv: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spill", default=tempfile.gettempdir(), help="on a fast disk")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--keep", action="store_true", help="keep activations, to compare")
    args = parser.parse_args(argv)
    width, layers, batch, tokens = (64, 2, 4, 64) if args.tiny else (512, 8, 8, 512)

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=width, n_layer=layers, n_head=width // 32, n_positions=tokens, vocab_size=256,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    corpus = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    starts = torch.randint(len(corpus) - tokens, (args.steps * batch,))
    rows = [corpus[start : start + tokens].long() for start in starts]

    offloaded = OffloadCallback(spill=[args.spill], min_bytes=1 << 14)
    with tempfile.TemporaryDirectory() as folder, offloaded as callback:
        training = TrainingArguments(
            output_dir=folder, max_steps=args.steps, per_device_train_batch_size=batch,
            report_to=[], save_strategy="no", logging_steps=max(args.steps // 5, 1),
        )  # fmt: skip
        Trainer(
            model,
            training,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[] if args.keep else [callback],
        ).train()
    if callback.offload is not None:
        print(callback.offload.report())
    return model


if __name__ == "__main__":
    main()
