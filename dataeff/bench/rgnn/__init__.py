"""One relational layer on graphs of published sizes: ours beside what else can be had.

Hector's protocol (arXiv 2301.06284): one layer on the full graph, 64 features in and out, one head;
a training step is forward, the mean of squares, and backward to weights and features. Outputs and
gradients of all providers must agree. Graphs are generated (`datasets`); those that memory does not
hold are recorded as skipped with both numbers.

`dataeff` keeps a graph's index structures, as training on a whole graph does; `dataeff, new graph`
derives them in every step, as mini-batches must; `dataeff, passes off` leaves out compaction and
linear operator reordering. Bytes and flops are those of the kernels that the compiler chose.

`peak_over_tensors` is the host memory of a step at its peak, index structures aside, over that of
features, edges, parameters, outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from dataeff.bench import ceilings
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.rgnn import handwritten, ours, peers
from dataeff.bench.rgnn.datasets import DATASETS, Edges, generate, uniform
from dataeff.bench.rgnn.workload import Workload, require_memory

PYG = ("torch_geometric",)
PYG_LAYERS = {
    "RGCNConv": ("RGCNConv", "FastRGCNConv"),
    "RGATConv": ("RGATConv",),
    "HGTConv": ("HGTConv",),
}
COMPILES = {"RGCNConv": "FastRGCNConv", "RGATConv": "RGATConv"}  # without a loop over relations
QUICK = ("aifb",)


@dataclass(frozen=True)
class Size:
    """A graph to be made: a dataset's name or what grows, its numbers, and how."""

    name: str
    nodes: int
    edges: int
    relations: int
    make: Callable[[], Edges]


def cases(options: Options) -> Iterator[Case]:
    """Training and inference on the datasets at 64, training at 32 and 128, and growth."""
    for size in _datasets(options):
        for model in PYG_LAYERS:
            yield _case(options, model, size, 64, training=True)
            yield _case(options, model, size, 64, training=False)
    if options.quick:
        return
    for size in _datasets(options):
        for model in PYG_LAYERS:
            for dim in (32, 128):
                yield _case(options, model, size, dim, training=True)
    for size, dim in _growth():
        for model in PYG_LAYERS:
            yield _case(options, model, size, dim, training=True)


def _datasets(options: Options) -> Iterator[Size]:
    for d in DATASETS:
        if not options.quick or d.name in QUICK:
            make = partial(generate, d, options.seed)
            yield Size(d.name, d.nodes, d.edges, d.relations, make)


def _growth() -> Iterator[tuple[Size, int]]:
    """Sizes in which one number grows: edges, relations, width."""
    numbers = [(edges, 64, 64) for edges in (10**4, 10**5, 10**6, 10**7)]
    numbers += [(10**6, relations, 64) for relations in (1, 8, 500, 2000)]
    numbers += [(10**5, 64, dim) for dim in (16, 256, 512)]
    for edges, relations, dim in numbers:
        nodes = edges // 10
        make = partial(uniform, nodes, edges, relations)
        yield Size("uniform", nodes, edges, relations, make), dim


def _case(options: Options, model: str, size: Size, dim: int, *, training: bool) -> Case:
    layers = PYG_LAYERS[model]
    providers = [Provider(f"PyG {name}", _if_held(partial(peers.pyg, name)), requires=PYG)
                 for name in layers]  # fmt: skip
    if model != "HGTConv":
        providers += [
            Provider("hand-written ATen", _if_held(handwritten.aten)),
            Provider("hand-written grouped_mm", _if_held(handwritten.grouped)),
        ]
    providers += [
        Provider("dataeff", _if_held(ours.kept), role="ours"),
        Provider("dataeff, passes off", _if_held(ours.without_passes), role="ours"),
    ]
    if training:
        providers.append(Provider("dataeff, new graph", _if_held(ours.new_graph), role="ours"))
        # Compiling takes longer than the rest of a quick run.
        if model in COMPILES and not options.quick:
            compiled = _if_held(partial(peers.compiled, COMPILES[model]))
            providers.append(Provider(f"PyG {COMPILES[model]}, compiled", compiled, requires=PYG))
        if model == "RGCNConv":
            providers.append(Provider("DGL RelGraphConv", _if_held(peers.dgl), requires=("dgl",)))
    moved = min(size.edges * dim * 4, 1 << 28)
    what = "training" if training else "inference"
    numbers = f"nodes={size.nodes} edges={size.edges} relations={size.relations} dim={dim}"
    return Case(
        size=f"{model} {what} {size.name} {numbers}",
        inputs=partial(_inputs, options.device, model, size, dim, training),
        providers=tuple(providers),
        ceilings=(
            ceilings.memcpy(moved) if options.device.type == "cpu" else ceilings.device_copy(moved),
            ceilings.matmul(1 << 14, 256, 256, torch.float32, options.device),
        ),
        tolerance=(2e-3, 2e-5),
    )


def _inputs(
    device: torch.device, model: str, size: Size, dim: int, training: bool
) -> Workload | str:
    """The workload, or why memory does not hold it."""
    wide = dim * 4 * (2 * size.edges + 6 * size.nodes) * (2 if training else 1)
    try:
        require_memory(wide + 200 * size.edges, "features, messages and edges take about")
    except Unavailable as reason:
        return str(reason)
    edges = size.make()
    work = Workload(
        model=model,
        nodes=size.nodes,
        relations=size.relations,
        dim=dim,
        training=training,
        x=torch.randn(size.nodes, dim).to(device),
        edges=Edges(edges.edge_index.to(device), edges.edge_type.to(device), edges.type_ptr),
        state={},
    )
    return replace(work, state=ours.fresh_state(work))


def _if_held(make: Callable[[Workload], Step]) -> Callable[[Workload | str], Step]:
    def made(work: Workload | str) -> Step:
        if isinstance(work, str):
            raise Unavailable(work)
        return make(work)

    return made
