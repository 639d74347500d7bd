"""Train a byte-level GPT with its activations on disk instead of in memory.

    python examples/train_gpt_offload.py --spill /nvme0 --text my_corpus.txt

`with offload:` is all that is added; the weights come out bit for bit as without it (`--keep`).
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import dataeff


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):  # [batch, tokens, width]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, tokens: int):
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256))

    def forward(self, data):  # [batch, tokens] -> logits [batch, tokens, 256]
        positions = torch.arange(data.size(1), device=data.device)
        return self.head(self.blocks(self.bytes(data) + self.positions(positions)))


def main(argv: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__))
    parser.add_argument("--spill", default=tempfile.gettempdir(), help="on a fast disk")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--keep", action="store_true", help="keep activations, to compare")
    args = parser.parse_args(argv)
    width, layers, batch, tokens = (64, 2, 4, 64) if args.tiny else (512, 8, 8, 512)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8)
    model = GPT(width, layers, heads=width // 32, tokens=tokens).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    keep = (lambda saved: False) if args.keep else "all"
    offload = dataeff.ActivationOffload(model, [args.spill], policy=keep, min_bytes=1 << 14)

    for step in range(args.steps):
        starts = torch.randint(len(corpus) - tokens - 1, (batch,))
        data = torch.stack([corpus[s : s + tokens + 1] for s in starts]).long().to(device)
        with offload:
            logits = model(data[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    print(offload.report())
    return model


if __name__ == "__main__":
    main()
