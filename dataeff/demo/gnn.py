"""The graph part of the demo: learn which package a function comes from, out of its relations.

Features stay in host memory in a `FeatureTable`; each mini-batch is sampled, its rows are gathered
while the batch before it is computed, and two relational attention layers run over its blocks. Two
baselines say what that is worth: the most frequent class, and an MLP that sees only the function.
"""

from __future__ import annotations

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
    figures |= _train_features_only(graph, settings, device, seed, figures["num_epochs"], console)
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
            curve = _fit(model, losses, predict, graph, settings, settings.num_epochs, advance)
        timeline = middle_stretch(ledger.spans, "compute", num_spans=8)
        train_s = time.perf_counter() - started
        test = graph.nodes_of("test")
        accuracy = _accuracy(model, predict, graph, test)
        stats = stream.table.stats()
    return {
        "test_accuracy": accuracy,
        "train_s": train_s,
        "num_epochs": len(curve["loss"]),
        "stopped_early": len(curve["loss"]) < settings.num_epochs,
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
    num_epochs: int,
    console: Any,
) -> dict[str, Any]:
    """The same labels, batches, optimiser and number of epochs, without the graph."""
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
        curve = _fit(model, losses, predict, graph, settings, num_epochs, advance)
    accuracy = _accuracy(model, predict, graph, graph.nodes_of("test"))
    return {"mlp_accuracy": accuracy, "mlp_curve": curve}


def _fit(
    model: nn.Module,
    losses: Callable[[Tensor], Iterator[Tensor]],
    predict: Callable[[Tensor], Tensor],
    graph: CodeGraph,
    settings: GraphSettings,
    num_epochs: int,
    advance: Advance,
) -> dict[str, list[float]]:
    """Trains with AdamW and one learning-rate cycle; loss and validation accuracy per epoch."""
    train, val = graph.nodes_of("train"), graph.nodes_of("val")
    num_batches = -(-train.numel() // settings.batch_size)
    total = num_batches * num_epochs
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=total
    )
    curve: dict[str, list[float]] = {"loss": [], "val_accuracy": []}
    started, step = time.perf_counter(), 0
    for _ in range(num_epochs):
        model.train()
        epoch_loss = []
        for loss in losses(train[torch.randperm(train.numel())]):
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            epoch_loss.append(loss.detach())
            step += 1
            advance(step, total)
        curve["loss"].append(torch.stack(epoch_loss).mean().item())
        curve["val_accuracy"].append(_accuracy(model, predict, graph, val))
        if time.perf_counter() - started > settings.max_seconds:
            break
    return curve


@torch.no_grad()
def _accuracy(
    model: nn.Module, predict: Callable[[Tensor], Tensor], graph: CodeGraph, nodes: Tensor
) -> float:
    model.eval()
    return (predict(nodes) == graph.y[nodes]).float().mean().item()
