"""A byte-level GPT in plain PyTorch.

Dimensions: B sequences, T positions, D width, H heads, V = 256 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_BYTES = 256


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, then an MLP of four times the width."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(-2))
        hidden: Tensor = self.contract(F.gelu(self.expand(self.norm_mlp(x))))
        return x + hidden


class GPT(nn.Module):
    """Predicts the next byte.

    Args:
        dim: width.
        num_layers: blocks.
        num_heads: attention heads, a divisor of `dim`.
        context: longest sequence.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, context: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.token = nn.Embedding(NUM_BYTES, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, NUM_BYTES)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next byte, [B, T] int64 -> [B, T, V]."""
        position = self.position(torch.arange(tokens.shape[1], device=tokens.device))
        scores: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + position)))
        return scores
