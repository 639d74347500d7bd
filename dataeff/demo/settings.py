"""How large the demo is: fixed sizes per kind of machine, so that two runs can be compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class GraphSettings:
    """Sizes of the graph part.

    Attributes:
        scale: share of the source files, in (0, 1].
        min_files: files a package needs to be a class.
        fanouts: neighbours sampled per hop, one hop per layer.
        max_seconds: the learning-rate cycle is compressed to end after this time.
    """

    scale: float = 1.0
    num_features: int = 256
    min_files: int = 8
    hidden: int = 64
    heads: int = 4
    fanouts: tuple[int, ...] = (12, 8)
    batch_size: int = 512
    num_epochs: int = 6
    learning_rate: float = 4e-3
    max_seconds: float = 150.0


@dataclass(frozen=True)
class TextSettings:
    """Sizes of the language-model part.

    Attributes:
        num_warmup: steps before times are taken; in them saved bytes are counted.
        max_seconds: steps end when this time is over, both arms at the same one.
    """

    dim: int = 256
    num_layers: int = 6
    num_heads: int = 4
    context: int = 256
    batch_size: int = 8
    num_steps: int = 30
    num_warmup: int = 2
    learning_rate: float = 1e-3
    min_bytes: int = 1 << 18
    max_bytes: int = 1 << 26
    max_seconds: float = 120.0


@dataclass(frozen=True)
class Settings:
    """All sizes of a run."""

    graph: GraphSettings
    text: TextSettings


def choose_settings(device: torch.device, *, scale: float, tiny: bool) -> Settings:
    """Sizes for a machine: a run takes about five minutes on two cores, and less on a GPU.

    Args:
        device: where it will run.
        scale: share of the source files, in (0, 1].
        tiny: seconds instead of minutes, to see that everything works.
    """
    graph, text = GraphSettings(scale=scale), TextSettings()
    if device.type == "cuda":
        graph = replace(graph, hidden=128, fanouts=(16, 12), batch_size=1024, num_epochs=20)
        text = replace(text, dim=1024, num_layers=12, num_heads=16, context=1024, num_steps=40)
    if tiny:
        graph = replace(
            graph,
            scale=min(scale, 0.04),
            num_features=32,
            min_files=4,
            hidden=16,
            heads=2,
            fanouts=(4, 3),
            num_epochs=2,
        )
        text = TextSettings(
            dim=32,
            num_layers=2,
            num_heads=2,
            context=64,
            num_steps=4,
            num_warmup=1,
            min_bytes=1 << 14,
            max_bytes=1 << 20,
        )
    return Settings(graph, text)
