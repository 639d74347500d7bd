"""The graph part of the demo: learn which package a function comes from, out of its relations.

Features stay in host memory in a `FeatureTable`; each mini-batch is sampled, its rows are gathered
while the batch before it is computed, and two relational attention layers run over its blocks. Two
baselines say what that is worth: the most frequent class, and an MLP that sees only the function.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataeff.data import NODE_TYPES, CodeGraph, build_code_graph
from dataeff.demo.gnn_model import FeatureClassifier, RelationalClassifier, blocks
from dataeff.demo.settings import GraphSettings
from dataeff.demo.timeline import middle_stretch
from dataeff.features import FeatureTable
from dataeff.ledger import Ledger
from dataeff.rgnn import Graph
from dataeff.sampling import CSCGraph, NeighborSampler

Advance = Callable[[int, int], None]  # (done, total)

_MAX_SPANS = 20_000


@dataclass
class GraphBatch:
    """One mini-batch on its device: seeds, features and types of its nodes, a block per layer."""

    seeds: Tensor
    x: Tensor
    node_type: Tensor
    y: Tensor
    graphs: list[Graph]


class BatchStream:
    """Sampled mini-batches, each gathered while the one before it is computed.

    Args:
        graph: the graph; its features stay where they are.
        settings: fan-outs and batch size.
        device: where batches go.
        ledger: is told when samples, gathers and waits ran.
    """

    def __init__(
        self, graph: CodeGraph, settings: GraphSettings, device: torch.device, ledger: Ledger
    ) -> None:
        self.graph, self.device, self.ledger = graph, device, ledger
        self.batch_size = settings.batch_size
        self.table = FeatureTable(graph.x)
        csc = CSCGraph(
            graph.edge_index,
            graph.edge_type,
            num_nodes=graph.num_nodes,
            num_relations=graph.num_relations,
        )
        self.sampler = NeighborSampler(csc, settings.fanouts)
        self._num_drawn = 0

    def batches(self, nodes: Tensor) -> Iterator[GraphBatch]:
        """Batches over `nodes`, in their order."""
        started = None
        for seeds in nodes.split(self.batch_size):
            following = self._start(seeds)
            if started is not None:
                yield self._finish(*started)
            started = following
        if started is not None:
            yield self._finish(*started)

    def _start(self, seeds: Tensor) -> tuple[Any, Any]:
        with self.ledger.timed("sample", "sample"):
            sample = self.sampler.sample(seeds, seed=self._num_drawn)
        self._num_drawn += 1
        return sample, self.table.prefetch(sample.n_id.to(self.device))

    def _finish(self, sample: Any, prefetch: Any) -> GraphBatch:
        seeds = sample.n_id[: sample.num_seeds]
        with self.ledger.timed("blocks", "blocks"):
            graphs = blocks(sample, self.graph.num_relations, self.device)
            node_type = self.graph.node_type[sample.n_id].to(self.device)
        with self.ledger.timed("gather wait", "gather wait"):
            x = prefetch.wait()
        return GraphBatch(seeds, x, node_type, self.graph.y[seeds].to(self.device), graphs)


def run_gnn(
    settings: GraphSettings, device: torch.device, seed: int, console: Any
) -> dict[str, Any]:
    """Builds the graph, trains the model and its baselines, and returns every figure.

    Args:
        settings: sizes.
        device: where the models run.
        seed: of the split, the weights and the samples.
        console: shows progress, as `dataeff.demo.console.Console`.
    """
    started = time.perf_counter()
    with console.task("parse the installed Python") as advance:
        graph = build_code_graph(
            scale=settings.scale,
            dim=settings.num_features,
            seed=seed,
            min_files=settings.min_files,
            progress=advance,
        )
    build_s = time.perf_counter() - started
    train, test = graph.nodes_of("train"), graph.nodes_of("test")
    majority = graph.y[train].bincount().argmax()
    figures: dict[str, Any] = {
        "num_nodes": graph.num_nodes,
        "num_edges": graph.num_edges,
        "num_relations": graph.num_relations,
        "num_classes": len(graph.class_names),
        "num_train": train.numel(),
        "num_test": test.numel(),
        "num_files": graph.num_files,
        "num_skipped_files": graph.num_skipped,
        "feature_bytes": graph.x.nbytes,
        "build_s": build_s,
        "majority_accuracy": (graph.y[test] == majority).float().mean().item(),
        "majority_class": graph.class_names[majority],
    }
    figures |= _train_relational(graph, settings, device, seed, console)
    figures |= _train_features_only(graph, settings, device, seed, figures["num_steps"], console)
    return figures


def _train_relational(
    graph: CodeGraph, settings: GraphSettings, device: torch.device, seed: int, console: Any
) -> dict[str, Any]:
    torch.manual_seed(seed)
    ledger = Ledger(max_spans=_MAX_SPANS)
    model = RelationalClassifier(
        settings.num_features,
        settings.hidden,
        len(graph.class_names),
        num_relations=graph.num_relations,
        num_node_types=len(NODE_TYPES),
        num_layers=len(settings.fanouts),
        heads=settings.heads,
    ).to(device)
    stream = BatchStream(graph, settings, device, ledger)
    num_steps = settings.num_epochs * -(-graph.nodes_of("train").numel() // settings.batch_size)

    def losses(nodes: Tensor) -> Iterator[Tensor]:
        for batch in stream.batches(nodes):
            with ledger.timed("compute", "forward + backward"):
                scores = model(batch.x, batch.node_type, batch.graphs)
                yield F.cross_entropy(scores, batch.y, label_smoothing=0.05)

    def predict(nodes: Tensor) -> Tensor:
        parts = [
            model(b.x, b.node_type, b.graphs).argmax(dim=1).cpu() for b in stream.batches(nodes)
        ]
        return torch.cat(parts)

    with stream.table:
        started = time.perf_counter()
        with console.task("train relational attention") as advance:
            curve = _fit(model, losses, predict, graph, settings, num_steps, advance)
        timeline = middle_stretch(ledger.spans, "compute", num_spans=8)
        train_s = time.perf_counter() - started
        test = graph.nodes_of("test")
        accuracy = _accuracy(model, predict, graph, test)
        stats = stream.table.stats()
    return {
        "test_accuracy": accuracy,
        "train_s": train_s,
        "num_steps": len(curve["loss"]),
        "num_epochs": settings.num_epochs * len(curve["loss"]) / num_steps,
        "stopped_early": len(curve["loss"]) < num_steps,
        "curve": curve,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "rows_gathered": stats.num_rows,
        "bytes_gathered": dict(stats.nbytes),
        "timeline": timeline,
    }


def _train_features_only(
    graph: CodeGraph,
    settings: GraphSettings,
    device: torch.device,
    seed: int,
    num_steps: int,
    console: Any,
) -> dict[str, Any]:
    """The same labels, batches, optimiser and number of steps, without the graph."""
    torch.manual_seed(seed)
    hidden = 4 * settings.hidden  # a narrow MLP would be an easy opponent
    model = FeatureClassifier(settings.num_features, hidden, len(graph.class_names)).to(device)

    def losses(nodes: Tensor) -> Iterator[Tensor]:
        for seeds in nodes.split(settings.batch_size):
            scores = model(graph.x[seeds].to(device))
            yield F.cross_entropy(scores, graph.y[seeds].to(device), label_smoothing=0.05)

    def predict(nodes: Tensor) -> Tensor:
        parts = [
            model(graph.x[seeds].to(device)).argmax(dim=1).cpu()
            for seeds in nodes.split(settings.batch_size)
        ]
        return torch.cat(parts)

    with console.task("train features-only MLP") as advance:
        curve = _fit(model, losses, predict, graph, settings, num_steps, advance)
    accuracy = _accuracy(model, predict, graph, graph.nodes_of("test"))
    return {"mlp_accuracy": accuracy, "mlp_curve": curve}


def _fit(
    model: nn.Module,
    losses: Callable[[Tensor], Iterator[Tensor]],
    predict: Callable[[Tensor], Tensor],
    graph: CodeGraph,
    settings: GraphSettings,
    num_steps: int,
    advance: Advance,
) -> dict[str, list[float]]:
    """Trains with AdamW and one learning-rate cycle of `num_steps`, shorter when time runs out.

    The rate follows the share of the steps or of the time that is gone, whichever is larger: where
    time is short, it still ends at zero.

    Returns:
        `loss` of each step, `val_accuracy` after each pass over the training nodes, and after how
        many steps that was (`val_step`).
    """
    train, val = graph.nodes_of("train"), graph.nodes_of("val")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    curve: dict[str, list[float]] = {"loss": [], "val_accuracy": [], "val_step": []}
    started = time.perf_counter()
    gone = 0.0
    while gone < 1:
        model.train()
        for loss in losses(train[torch.randperm(train.numel())]):
            optimizer.param_groups[0]["lr"] = settings.learning_rate * _cycle(gone)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            curve["loss"].append(loss.item())
            advance(len(curve["loss"]), num_steps)
            elapsed = (time.perf_counter() - started) / settings.max_seconds
            gone = max(len(curve["loss"]) / num_steps, elapsed)
            if gone >= 1:
                break
        curve["val_accuracy"].append(_accuracy(model, predict, graph, val))
        curve["val_step"].append(len(curve["loss"]))
    return curve


def _cycle(gone: float) -> float:
    """One cycle of the learning rate (arXiv 1708.07120): up over the first 0.3, then down to 0."""
    if gone < 0.3:
        return 0.52 - 0.48 * math.cos(math.pi * gone / 0.3)
    return 0.5 + 0.5 * math.cos(math.pi * (gone - 0.3) / 0.7)


@torch.no_grad()
def _accuracy(
    model: nn.Module, predict: Callable[[Tensor], Tensor], graph: CodeGraph, nodes: Tensor
) -> float:
    model.eval()
    return (predict(nodes) == graph.y[nodes]).float().mean().item()
