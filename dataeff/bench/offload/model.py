"""What the offload is measured on: GPT, BERT and T5 by their attention, and an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256

Kind = Literal["gpt", "bert", "t5", "mlp"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its batch.

    Attributes:
        layers: blocks; of a T5, half of them (rounded down) are the decoder's.
        width: of the residual stream.
        batch: sequences.
        tokens: per sequence.
        kind: causal (gpt), bidirectional (bert), encoder and decoder (t5), or no attention (mlp).
        head_width: of one attention head.
        dtype: of weights and activations.
    """

    layers: int
    width: int
    batch: int
    tokens: int
    kind: Kind = "gpt"
    head_width: int = 64
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]
        kind = "" if self.kind == "gpt" else f"{self.kind} "
        return (
            f"{kind}layers={self.layers} width={self.width} batch={self.batch} "
            f"tokens={self.tokens} {dtype}"
        )


class Attention(nn.Module):
    """Multi-head attention, of the sequence to itself or to `memory`."""

    def __init__(self, shape: Shape, causal: bool, cross: bool = False) -> None:
        super().__init__()
        self.head_width, self.causal = shape.head_width, causal
        self.norm = nn.LayerNorm(shape.width)
        self.q = nn.Linear(shape.width, shape.width) if cross else None
        self.qkv = nn.Linear(shape.width, (2 if cross else 3) * shape.width)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """x: [batch, tokens, width], memory: the same -> what is added to x."""
        y = self.norm(x)
        if self.q is None:
            split = self.qkv(y).chunk(3, -1)
        else:
            split = (self.q(y), *self.qkv(memory).chunk(2, -1))
        heads = (z.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for z in split)
        q, k, v = heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """A pre-norm transformer block; a decoder's also attends to the encoder, an MLP's to none."""

    def __init__(self, shape: Shape, causal: bool, cross: bool = False) -> None:
        super().__init__()
        width = shape.width
        self.attention = None if shape.kind == "mlp" else Attention(shape, causal)
        self.cross = Attention(shape, False, cross=True) if cross else None
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """x: [batch, tokens, width] -> the same."""
        if self.attention is not None:
            x = x + self.attention(x)
        if self.cross is not None:
            x = x + self.cross(x, memory)
        hidden: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + hidden


class Transformer(nn.Module):
    """Bytes in, the loss of predicting them (the next byte, when causal) out.

    `blocks` run one after another; `recompute` wraps each in `torch.utils.checkpoint`.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.causal = shape.kind != "bert"
        self.num_encoder = shape.layers - shape.layers // 2 if shape.kind == "t5" else 0
        self.embed = nn.Embedding(VOCABULARY, shape.width)
        self.position = nn.Parameter(torch.zeros(shape.tokens, shape.width))
        self.blocks = nn.ModuleList(
            Block(shape, self.causal and i >= self.num_encoder, 0 < self.num_encoder <= i)
            for i in range(shape.layers)
        )
        self.head = nn.Linear(shape.width, VOCABULARY)
        self.recompute = False

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, tokens], int64 -> scalar loss."""
        x = start = self.embed(tokens) + self.position
        memory: Tensor | None = None
        for i, block in enumerate(self.blocks):
            if i == self.num_encoder > 0:
                x, memory = start, x
            x = self._run(block, x, memory)
        logits = self.head(x)
        if self.causal:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def _run(self, block: nn.Module, x: Tensor, memory: Tensor | None) -> Tensor:
        inputs = (x,) if memory is None else (x, memory)
        if not self.recompute:
            result: Tensor = block(*inputs)
            return result
        from torch.utils.checkpoint import checkpoint

        again: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return again
