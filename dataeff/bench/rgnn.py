"""A training step of one relational layer: ours beside PyTorch Geometric's, from equal weights.

The step is forward, the mean of squares, and backward to the weights and the features; output and
gradients must agree. Graphs are random: sources uniform, relations by a power law as real graphs
have them. `dataeff` keeps what it derives from a graph for the next step, as training on a whole
graph does; `dataeff, new graph` derives it in every step, as mini-batches must.

The rate counts the typed products over edges with their two gradients, 6 E D D operations, for all
alike: whoever computes a product once per (node, relation) pair does fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dataeff.bench import ceilings
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable

MAX_WEIGHTS_PER_EDGE_NBYTES = 4 << 30
PYG = ("torch_geometric",)


@dataclass(frozen=True)
class Shape:
    """N nodes, E edges, R relations, D features in and out."""

    nodes: int
    edges: int
    relations: int
    dim: int

    def __str__(self) -> str:
        return f"nodes={self.nodes} edges={self.edges} relations={self.relations} dim={self.dim}"


@dataclass(frozen=True)
class Inputs:
    """x: [N, D]; edge_index: [2, E]; edge_type: [E]; state: of the layer, under PyG's names."""

    shape: Shape
    x: Tensor
    edge_index: Tensor
    edge_type: Tensor
    state: dict[str, Tensor]


def cases(options: Options) -> Iterator[Case]:
    """RGCN and RGAT on small graphs, and in a full run on a larger one."""
    small, middle = Shape(5_000, 20_000, 16, 32), Shape(20_000, 100_000, 64, 64)
    large = Shape(100_000, 1_000_000, 64, 64)
    for shape in options.pick(full=(small, middle, large), quick=(small,)):
        for model, peers in (
            ("RGCNConv", (("RGCNConv", _light), ("FastRGCNConv", _heavy))),
            ("RGATConv", (("RGATConv", _heavy),)),
        ):
            yield Case(
                size=f"{model} {shape}",
                inputs=partial(_inputs, model, shape, options.device),
                providers=(
                    *(
                        Provider(f"PyG {name}", partial(of, name), requires=PYG)
                        for name, of in peers
                    ),
                    Provider("dataeff", partial(_ours, model, False), role="ours"),
                    Provider("dataeff, new graph", partial(_ours, model, True), role="ours"),
                ),
                ceilings=(
                    ceilings.matmul(
                        shape.edges, shape.dim, shape.dim, torch.float32, options.device
                    ),
                ),
                flops=6 * shape.edges * shape.dim**2,
                tolerance=(1e-3, 1e-5),
            )


def _inputs(model: str, shape: Shape, device: torch.device) -> Inputs:
    import dataeff.nn

    # The k-th most frequent relation has odds of 1 / k.
    odds = 1 / torch.arange(1, shape.relations + 1, dtype=torch.float64)
    layer = getattr(dataeff.nn, model)(shape.dim, shape.dim, shape.relations)
    return Inputs(
        shape=shape,
        x=torch.randn(shape.nodes, shape.dim).to(device),
        edge_index=torch.randint(shape.nodes, (2, shape.edges)).to(device),
        edge_type=torch.multinomial(odds, shape.edges, replacement=True).to(device),
        state={name: value.to(device) for name, value in layer.state_dict().items()},
    )


def _training_step(
    conv: torch.nn.Module, inputs: Inputs, edges: Callable[[], tuple[Tensor, Tensor]]
) -> Step:
    conv = conv.to(inputs.x.device)
    conv.load_state_dict(inputs.state)
    x = inputs.x.clone().requires_grad_()
    leaves: dict[str, Any] = {"x": x, **dict(conv.named_parameters())}

    def call() -> dict[str, Tensor | None]:
        for leaf in leaves.values():
            leaf.grad = None
        y = conv(x, *edges())
        y.square().mean().backward()
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    return Step(call)


def _light(name: str, inputs: Inputs) -> Step:
    from torch_geometric import nn

    shape = inputs.shape
    conv = getattr(nn, name)(shape.dim, shape.dim, shape.relations)
    return _training_step(conv, inputs, lambda: (inputs.edge_index, inputs.edge_type))


def _heavy(name: str, inputs: Inputs) -> Step:
    """A PyG layer that copies a [D, D] weight to every edge."""
    shape = inputs.shape
    nbytes = shape.edges * shape.dim**2 * 4
    if nbytes > MAX_WEIGHTS_PER_EDGE_NBYTES:
        raise Unavailable(f"a weight per edge would take {nbytes / 1e9:.0f} GB, gradients as much")
    return _light(name, inputs)


def _ours(name: str, new_graph: bool, inputs: Inputs) -> Step:
    import dataeff.nn

    shape = inputs.shape
    conv = getattr(dataeff.nn, name)(shape.dim, shape.dim, shape.relations)

    def edges() -> tuple[Tensor, Tensor]:
        if new_graph:
            return inputs.edge_index.clone(), inputs.edge_type.clone()
        return inputs.edge_index, inputs.edge_type

    return _training_step(conv, inputs, edges)
