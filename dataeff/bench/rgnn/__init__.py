"""One relational layer on graphs of published sizes: ours beside what else can be had.

Hector's protocol (arXiv 2301.06284): one layer on the full graph, 64 features in and out, one head;
a training step is forward, and backward to weights and features from a gradient of the outputs that
is given. Outputs and gradients of all providers must agree. Graphs are generated (`datasets`); what
memory does not hold, or takes longer than `limits` allow, is recorded as skipped with its numbers.

`dataeff` keeps a graph's index structures, as training on a whole graph does; `dataeff, new graph`
derives them in every step, as mini-batches must; `dataeff, passes off` leaves out compaction and
linear operator reordering. Bytes and flops are those of the kernels that the compiler chose.

`GatedConv` is a layer in no paper, typed in a few lines, beside its formula in plain PyTorch.

A full run is long; `--only` runs a part of it: " aifb " or any other graph, " block ", " code ",
" growth ", "RGATConv training", "dim=128".

`peak_over_tensors` is the memory of a step at its peak, index structures aside, over that of
features, edges, parameters, outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dataeff.bench import ceilings
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.rgnn import handwritten, ours, own, peers
from dataeff.bench.rgnn.datasets import DATASETS, Edges, Statistics, generate, uniform
from dataeff.bench.rgnn.limits import CALL_LIMIT_S, OURS_LIMIT_S, SHORT_LIMIT_S, within_limits
from dataeff.bench.rgnn.workload import Workload, require_memory

PYG = ("torch_geometric",)
PYG_LAYERS = {
    "RGCNConv": ("RGCNConv", "FastRGCNConv"),
    "RGATConv": ("RGATConv",),
    "HGTConv": ("HGTConv",),
}
OWN = "GatedConv"  # a layer in no paper
COMPILES = {"RGCNConv": "FastRGCNConv", "RGATConv": "RGATConv"}  # without a loop over relations
QUICK = ("aifb",)
BLOCK_EDGES = 10**5
# Graphs of more edges are run at one width, and with the layers that are there as they are.
MANY_EDGES = 10**6
# Seconds of rounds for a case, and of a call from which on it is made twice in all.
BUDGET_S, SHORT_BUDGET_S = 4.0, 1.0
LONG_CALL_S = 0.5
# What may hang on which slope of a kink a rounded score is on: of a gradient of many elements, so
# many of them; of one of few, all of which add up all edges, so much of its length.
KINKED_SHARE, KINKED_LENGTH, FEW = 1e-4, 2e-3, 1024


@dataclass(frozen=True)
class Size:
    """A graph to be made: a dataset's name or what grows, its numbers if known, and how."""

    name: str
    nodes: int
    edges: int
    relations: int
    make: Callable[[], Edges]

    def __str__(self) -> str:
        if not self.edges:
            return self.name
        return f"{self.name} nodes={self.nodes} edges={self.edges} relations={self.relations}"


def cases(options: Options) -> Iterator[Case]:
    """The datasets at 64 with every peer; other widths, a block, the code graph, and growth."""
    for size in _datasets(options):
        for model in PYG_LAYERS:
            short = size.edges > MANY_EDGES
            yield _case(options, model, size, 64, training=True, short=short)
            yield _case(options, model, size, 64, training=False, short=short)
    if options.quick:
        return
    for size in _datasets(options):
        if size.edges <= MANY_EDGES:
            yield _case(options, OWN, size, 64, training=True)
            yield _case(options, OWN, size, 64, training=False)
    block = _uniform(BLOCK_EDGES // 10, BLOCK_EDGES, 64, "block")
    for model in PYG_LAYERS:
        yield _case(options, model, block, 64, training=False)
    for model in ("RGCNConv", "RGATConv"):  # a relation of the code graph joins several node types
        yield _case(options, model, CODE_GRAPH, 64, training=True)
        yield _case(options, model, CODE_GRAPH, 64, training=False)
    for size in _datasets(options):
        for model in PYG_LAYERS if size.edges <= MANY_EDGES else ():
            for dim in (32, 128):
                yield _case(options, model, size, dim, training=True, short=True)
    for size, dim in _growth():
        for model in PYG_LAYERS:
            yield _case(options, model, size, dim, training=True, short=True)


def _datasets(options: Options) -> Iterator[Size]:
    for d in DATASETS:
        if not options.quick or d.name in QUICK:
            make = partial(_generated, d, options.seed)
            yield Size(d.name, d.nodes, d.edges, d.relations, make)


@lru_cache(maxsize=1)  # of the cases that follow one another, which have the graph in common
def _generated(statistics: Statistics, seed: int) -> Edges:
    return generate(statistics, seed)


@cache
def _code_graph() -> Edges:
    from dataeff.data import build_code_graph

    graph = build_code_graph(dim=1)
    return Edges(graph.edge_index, graph.edge_type, torch.tensor([0, graph.num_nodes]))


CODE_GRAPH = Size("code", 0, 0, 0, _code_graph)


def _uniform(nodes: int, edges: int, relations: int, name: str) -> Size:
    return Size(name, nodes, edges, relations, partial(uniform, nodes, edges, relations))


def _growth() -> Iterator[tuple[Size, int]]:
    """Sizes in which one number grows: edges, relations, width."""
    numbers = [(edges, 64, 64) for edges in (10**4, 10**5, 10**6, 10**7)]
    numbers += [(10**6, relations, 64) for relations in (1, 8, 500, 2000)]
    numbers += [(10**5, 64, dim) for dim in (16, 256, 512)]
    for edges, relations, dim in numbers:
        yield _uniform(edges // 10, edges, relations, "growth"), dim


def _providers(
    options: Options, model: str, *, training: bool, short: bool, seconds: int
) -> Iterator[Provider]:
    """All that compute a model; first calls, but for ours, may take so many seconds.

    `short`: the layers that are there as they are, not every way.
    """
    limited = partial(within_limits, seconds=seconds)
    compiling = partial(limited, compiles=True)
    kept = within_limits(ours.kept, OURS_LIMIT_S, compiles=True)
    if model == OWN:
        yield Provider("plain PyTorch", limited(own.formula))
        yield Provider("dataeff", kept, role="ours")
        return
    for name in PYG_LAYERS[model]:
        yield Provider(f"PyG {name}", limited(partial(peers.pyg, name)), requires=PYG)
    if model != "HGTConv":
        yield Provider("hand-written ATen", limited(handwritten.aten))
        if not short:
            yield Provider("hand-written grouped_mm", limited(handwritten.grouped))
    yield Provider("dataeff", kept, role="ours")
    yield Provider("dataeff, passes off", compiling(ours.without_passes), role="ours")
    if short or not training:
        return
    yield Provider("dataeff, new graph", compiling(ours.new_graph), role="ours")
    # Compiling takes longer than the rest of a quick run.
    if model in COMPILES and not options.quick:
        compiled = partial(peers.compiled, COMPILES[model])
        yield Provider(f"PyG {COMPILES[model]}, compiled", compiling(compiled), requires=PYG)
    if model == "RGCNConv":
        yield Provider("DGL RelGraphConv", limited(peers.dgl), requires=("dgl",))


def _case(
    options: Options, model: str, size: Size, dim: int, *, training: bool, short: bool = False
) -> Case:
    wide = 256 if options.device.type == "cpu" else 2048  # enough for every part of a GPU
    moved = min(size.edges * dim * 4, 1 << 28) or 1 << 28
    what = "training" if training else "inference"
    seconds = CALL_LIMIT_S if dim == 64 and size.name != "growth" else SHORT_LIMIT_S
    found = _providers(options, model, training=training, short=short, seconds=seconds)
    return Case(
        size=f"{model} {what} {size} dim={dim}",
        group=f"{model} {what}",
        inputs=partial(_inputs, options.device, model, size, dim, training),
        providers=tuple(replace(each, make=_if_held(each.make)) for each in found),
        ceilings=(
            ceilings.memcpy(moved) if options.device.type == "cpu" else ceilings.device_copy(moved),
            ceilings.matmul(1 << 14, wide, wide, torch.float32, options.device),
        ),
        same=_assert_close,
        budget_s=SHORT_BUDGET_S if short else BUDGET_S,
        long_call_s=LONG_CALL_S,
    )


def _assert_close(expected: Any, actual: Any) -> None:
    """Raises AssertionError unless float32 sums agree that were taken in any order.

    A gradient of a parameter adds terms of every edge, large ones that cancel too: what its small
    elements are off by hangs on the largest. Where the score of an edge is nothing but rounding,
    `leaky_relu` has either slope: gradients of its nodes and relation may differ.
    """
    if isinstance(expected, Tensor):
        largest = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
        near = partial(torch.testing.assert_close, check_device=False)
        try:
            near(actual, expected, rtol=2e-3, atol=1e-4 * largest)
        except AssertionError:
            off = (actual - expected).abs()
            num_off = int((off > 2e-3 * expected.abs() + 1e-4 * largest).sum())
            if num_off > KINKED_SHARE * expected.numel() and not _is_short(off, expected):
                raise
            near(actual, expected, rtol=0, atol=1e-2 * largest)
        return
    assert expected.keys() == actual.keys(), f"{list(actual)} instead of {list(expected)}"
    for name, value in expected.items():
        try:
            _assert_close(value, actual[name])
        except AssertionError as difference:
            raise AssertionError(f"{name}: {difference}") from None


def _is_short(off: Tensor, expected: Tensor) -> bool:
    lengths = [float(torch.linalg.vector_norm(each)) for each in (off, expected)]
    return expected.numel() <= FEW and lengths[0] <= KINKED_LENGTH * lengths[1]


def _inputs(
    device: torch.device, model: str, size: Size, dim: int, training: bool
) -> Workload | str:
    """The workload, or why memory does not hold it."""
    rows = (4 if training else 2) * size.nodes
    try:
        require_memory(rows * dim * 4 + 150 * size.edges, "features and edges take about")
    except Unavailable as reason:
        return str(reason)
    edges = size.make()
    nodes = int(edges.type_ptr[-1])
    work = Workload(
        model=model,
        nodes=nodes,
        relations=size.relations or int(edges.edge_type.max()) + 1,
        dim=dim,
        training=training,
        x=torch.randn(nodes, dim).to(device),
        edges=edges.to(device),
        state={},
    )
    return replace(work, state=ours.fresh_state(work))


def _if_held(make: Callable[[Workload], Step]) -> Callable[[Workload | str], Step]:
    def made(work: Workload | str) -> Step:
        if isinstance(work, str):
            raise Unavailable(work)
        return make(work)

    return made
