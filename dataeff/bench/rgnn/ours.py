"""dataeff's layers: on a kept graph, on a new graph at every step, and without two passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataeff.bench.case import Step
from dataeff.bench.rgnn.workload import Workload

if TYPE_CHECKING:
    from dataeff.rgnn import Graph
    from dataeff.rgnn.plan import Plan

BUILDS = 5


def kept(work: Workload) -> Step:
    """The layer on a graph whose index structures are there, as in full-graph training."""
    conv, graph = _layer(work), _graph(work)
    nbytes, flops = traffic(conv, graph, work)

    def metrics() -> Mapping[str, tuple[float, str]]:
        built: list[float] = []
        for _ in range(BUILDS):
            start = time.perf_counter()
            _graph(work)
            built.append(time.perf_counter() - start)
        return {
            "index_build_s": (statistics.median(built), "s"),
            "index_bytes": (float(graph.nbytes), "bytes"),
            "src_pair_ratio": (graph.src_pair_ratio, "1"),
            "dst_pair_ratio": (graph.dst_pair_ratio, "1"),
        }

    return work.step(
        lambda x: conv(x, graph), dict(conv.named_parameters()), metrics, nbytes, flops
    )


def new_graph(work: Workload) -> Step:
    """The layer on edges seen for the first time, as in mini-batch training."""
    conv = _layer(work)
    edges = work.edges

    def forward(x: Tensor) -> Tensor:
        found: Tensor = conv(x, edges.edge_index.clone(), edges.edge_type.clone())
        return found

    return work.step(forward, dict(conv.named_parameters()))


def without_passes(work: Workload) -> Step:
    """The layer with compaction and linear operator reordering switched off."""
    from dataeff.rgnn.plan import disabled_passes

    conv, graph = _layer(work), _graph(work)
    step = work.step(lambda x: conv(x, graph), dict(conv.named_parameters()))

    def call() -> object:
        with disabled_passes("compact", "reorder", "aggregate_first"):
            return step.call()

    return Step(call)


def traffic(conv: torch.nn.Module, graph: Graph, work: Workload) -> tuple[int, int]:
    """Bytes (half of those read and written, as a copy counts) and flops of the chosen kernels."""
    from dataeff.rgnn.cost import step_cost

    nbytes = flops = 0
    for plan in _plans(conv, graph, work):
        runners = [plan.compiled.forward_runner, plan.compiled.backward_runner]
        for schedule in [r.schedule for r in runners if r is not None and r.schedule]:
            for number in range(len(schedule.steps)):
                cost = step_cost(schedule, number, plan.sizes, work.x.element_size())
                nbytes, flops = nbytes + cost.nbytes, flops + cost.flops
    return nbytes // 2, flops


def _plans(conv: torch.nn.Module, graph: Graph, work: Workload) -> list[Plan]:
    """The plans that one call of the layer, or of a training step, is carried out by."""
    from dataeff.rgnn.plan import watched_plans

    x = work.x.clone().requires_grad_(work.training)
    with watched_plans() as plans, torch.set_grad_enabled(work.training):
        conv(x, graph)
    return plans


def _layer(work: Workload) -> torch.nn.Module:
    import dataeff.nn

    conv: torch.nn.Module = getattr(dataeff.nn, work.model)(work.dim, work.dim, work.relations)
    conv = conv.to(work.x.device)
    conv.load_state_dict(work.state)
    return conv


def _graph(work: Workload) -> Graph:
    from dataeff import rgnn

    return rgnn.Graph(
        work.edges.edge_index,
        work.edges.edge_type,
        num_nodes=work.nodes,
        num_relations=work.relations,
    ).prepare()
