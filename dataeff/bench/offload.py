"""A training step of a GPT: activations offloaded, kept, and under PyTorch's `save_on_cpu`.

Every provider starts from the same weights and takes the same SGD steps; what its first step leaves
in the parameters must be the bits that keeping leaves. `peak_saved_bytes` is what was held for
backward at once (`OffloadReport`); for keeping it is counted by an offload that moves nothing, in
one untimed step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F

import dataeff
from dataeff.bench.case import Case, Options, Provider, Step

HEAD_WIDTH = 64
VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of its batch."""

    layers: int
    width: int
    batch: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"layers={self.layers} width={self.width} batch={self.batch} tokens={self.tokens} f32"
        )


@dataclass(frozen=True)
class Inputs:
    """What all providers share: weights, a batch, a place to spill to."""

    shape: Shape
    weights: dict[str, Tensor]
    tokens: Tensor
    directory: Path


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, tokens, width] -> the same."""
        heads = (z.unflatten(-1, (-1, HEAD_WIDTH)) for z in self.qkv(self.norm1(x)).chunk(3, -1))
        q, k, v = (z.transpose(1, 2) for z in heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + hidden


class GPT(nn.Module):
    """Bytes in, the loss of predicting the next byte out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, shape.width)
        self.position = nn.Parameter(torch.zeros(shape.tokens, shape.width))
        self.blocks = nn.Sequential(*(Block(shape.width) for _ in range(shape.layers)))
        self.head = nn.Linear(shape.width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, tokens], int64 -> scalar loss."""
        logits = self.head(self.blocks(self.embed(tokens) + self.position))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def cases(options: Options) -> Iterator[Case]:
    """One case per size of the model."""
    small, large = Shape(4, 256, 4, 128), Shape(12, 768, 8, 512)
    for shape in options.pick(full=(small, large), quick=(small,)):
        yield Case(
            size=str(shape),
            inputs=partial(_inputs, shape, options),
            providers=(
                Provider("keep", _keep),
                Provider("torch save_on_cpu", _save_on_cpu),
                Provider("dataeff disk", _disk, role="ours"),
            ),
        )


def _inputs(shape: Shape, options: Options) -> Inputs:
    model = GPT(shape).to(options.device)
    tokens = torch.randint(VOCABULARY, (shape.batch, shape.tokens), device=options.device)
    return Inputs(shape, model.state_dict(), tokens, options.directory)


def _model(inputs: Inputs) -> GPT:
    model = GPT(inputs.shape).to(inputs.tokens.device)
    model.load_state_dict(inputs.weights)
    return model


def _train(model: GPT, tokens: Tensor, around: AbstractContextManager[object]) -> list[Tensor]:
    """One SGD step; returns the parameters."""
    with around:
        model(tokens).backward()
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.sub_(p.grad, alpha=1e-3)
            p.grad = None
    return list(model.parameters())


def _keep(inputs: Inputs) -> Step:
    model = _model(inputs)

    def peak() -> dict[str, tuple[float, str]]:
        counting = dataeff.ActivationOffload(
            model, [inputs.directory], policy=lambda saved: False, min_bytes=0
        )
        _train(model, inputs.tokens, counting)
        counting.close()
        return {"peak_saved_bytes": (counting.report().peak_saved_bytes, "bytes")}

    return Step(lambda: _train(model, inputs.tokens, nullcontext()), metrics=peak)


def _save_on_cpu(inputs: Inputs) -> Step:
    model = _model(inputs)
    pin = inputs.tokens.is_cuda
    return Step(lambda: _train(model, inputs.tokens, save_on_cpu(pin_memory=pin)))


def _disk(inputs: Inputs) -> Step:
    model = _model(inputs)
    offload = dataeff.ActivationOffload(model, [inputs.directory], min_bytes=1 << 18)
    num_steps = 0

    def step() -> list[Tensor]:
        nonlocal num_steps
        num_steps += 1
        return _train(model, inputs.tokens, offload)

    def metrics() -> dict[str, tuple[float, str]]:
        report = offload.report()
        return {
            "peak_saved_bytes": (report.peak_saved_bytes, "bytes"),
            "bytes_written_per_step": (report.bytes_written / num_steps, "bytes"),
            "exposed_wait_per_step": (report.exposed_wait_s / num_steps, "s"),
        }

    return Step(step, close=offload.close, metrics=metrics)
