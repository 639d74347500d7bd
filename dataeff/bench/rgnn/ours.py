"""dataeff's layers: on a kept graph, on a new graph at every step, and without two passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dataeff.bench.case import Step
from dataeff.bench.lane import synchronize
from dataeff.bench.rgnn import typed
from dataeff.bench.rgnn.datasets import Edges
from dataeff.bench.rgnn.own import GatedConv
from dataeff.bench.rgnn.workload import Workload, require_memory

if TYPE_CHECKING:
    from dataeff.rgnn import Graph
    from dataeff.rgnn.plan import Plan

BUILDS = 5
BUILDING_S = 1.0  # of builds, after which no other is timed


def kept(work: Workload) -> Step:
    """The layer on a graph whose index structures are there, as in full-graph training."""
    conv, graph = _layer(work), _graph(work)
    kernels = traffic(conv, graph, work)

    def metrics() -> Mapping[str, tuple[float, str]]:
        built: list[float] = []
        while len(built) < BUILDS and sum(built) < BUILDING_S:
            synchronize(work.x.device)
            start = time.perf_counter()
            _built(work)
            synchronize(work.x.device)
            built.append(time.perf_counter() - start)
        return {
            "index_build_s": (statistics.median(built), "s"),
            "index_bytes": (float(graph.nbytes), "bytes"),
            "src_pair_ratio": (graph.src_pair_ratio, "1"),
            "dst_pair_ratio": (graph.dst_pair_ratio, "1"),
        }

    return work.step(_forward(conv, graph, work), dict(conv.named_parameters()), metrics, kernels)


def new_graph(work: Workload) -> Step:
    """The layer on edges seen for the first time, as in mini-batch training.

    Graphs are kept by the tensors they were made of, so others of the same memory are new ones.
    """
    conv = _layer(work)
    edges = work.edges
    if work.model == "HGTConv":
        by_type = typed.edge_index_dict(edges, work.relations)

        def clones(x_dict: dict[str, Tensor], kept: dict[typed.EdgeType, Tensor]) -> Any:
            return conv(x_dict, {key: value.detach() for key, value in kept.items()})

        return work.step(typed.forward(clones, by_type, work), dict(conv.named_parameters()))

    def forward(x: Tensor) -> Tensor:
        found: Tensor = conv(x, edges.edge_index.detach(), edges.edge_type.detach())
        return found

    return work.step(forward, dict(conv.named_parameters()))


def without_passes(work: Workload) -> Step:
    """The layer with compaction and linear operator reordering switched off."""
    from dataeff.rgnn.plan import disabled_passes

    rows_per_edge = 4 if work.training else 2
    require_memory(
        rows_per_edge * work.num_edges * work.dim * 4, "values per edge would take", work.x.device
    )
    conv, graph = _layer(work), _graph(work)
    step = work.step(_forward(conv, graph, work), dict(conv.named_parameters()))

    def call() -> object:
        with disabled_passes("compact", "reorder", "aggregate_first"):
            return step.call()

    return Step(call)


def traffic(conv: torch.nn.Module, graph: Graph, work: Workload) -> list[tuple[int, int]]:
    """Bytes (half of those read and written, as a copy counts) and flops of the chosen kernels."""
    from dataeff.rgnn.cost import step_cost

    found = []
    for plan in _plans(conv, graph, work):
        runners = [plan.compiled.forward_runner, plan.compiled.backward_runner]
        for schedule in [r.schedule for r in runners if r is not None and r.schedule]:
            for number in range(len(schedule.steps)):
                cost = step_cost(schedule, number, plan.sizes, work.x.element_size())
                found.append((cost.nbytes // 2, cost.flops))
    return found


def _plans(conv: torch.nn.Module, graph: Graph, work: Workload) -> list[Plan]:
    """The plans that one call of the layer, or of a training step, is carried out by."""
    from dataeff.rgnn.plan import watched_plans

    x = work.x.detach().requires_grad_(work.training)
    with watched_plans() as plans, torch.set_grad_enabled(work.training):
        _forward(conv, graph, work)(x)
    return plans


def _layer(work: Workload) -> torch.nn.Module:
    import dataeff.nn

    kinds: object = work.relations
    if work.model == "HGTConv":
        kinds = typed.metadata(work.edges, work.relations)
    made: Any = GatedConv if work.model == "GatedConv" else getattr(dataeff.nn, work.model)
    conv: torch.nn.Module = made(work.dim, work.dim, kinds).to(work.x.device)
    if work.state:
        conv.load_state_dict(work.state)
    return conv


def fresh_state(work: Workload) -> dict[str, Tensor]:
    """Random parameters of the layer."""
    return {name: value.detach() for name, value in _layer(work).state_dict().items()}


_kept: dict[tuple[int, bool], tuple[Edges, Graph]] = {}


def _graph(work: Workload) -> Graph:
    """The graph with its index structures; that of the last edges is kept for the next case."""
    key = id(work.edges), work.model == "HGTConv"
    if key not in _kept:
        _kept.clear()
        _kept[key] = work.edges, _built(work)
    return _kept[key][1]


def _built(work: Workload) -> Graph:
    from dataeff import rgnn

    if work.model == "HGTConv":
        names, edge_types = typed.metadata(work.edges, work.relations)
        counts = dict(zip(names, work.edges.type_ptr.diff().tolist(), strict=True))
        by_type = typed.edge_index_dict(work.edges, work.relations)
        return rgnn.Graph.from_typed(by_type, counts, edge_types=edge_types).prepare()
    return rgnn.Graph(
        work.edges.edge_index,
        work.edges.edge_type,
        num_nodes=work.nodes,
        num_relations=work.relations,
    ).prepare()


def _forward(conv: Any, graph: Graph, work: Workload) -> Callable[[Tensor], Tensor]:
    if work.model == "HGTConv":
        return typed.forward(conv, graph, work)
    return lambda x: conv(x, graph)
