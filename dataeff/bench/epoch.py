"""An epoch of GraphSAGE on a graph whose features stay in host memory.

PyG's loader with its PrefetchLoader is the peer: it samples in worker processes, gathers rows on
the CPU and copies them over. It needs pyg-lib or torch-sparse; the pattern of it, with the sampler
of this project in its place, runs everywhere and shows what the gather alone brings. Features are
taken not to fit the GPU: no provider keeps more than a tenth of them there.

Samples differ by chance, so what is compared is that every seed was trained on, and that the loss
is that of the same model on the same task, within what chance does to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import dataeff
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.features.hotness import weighted_reverse_pagerank

FANOUTS = [15, 10]
BATCH = 1024
HIDDEN = 128
NUM_CLASSES = 16
NUM_WORKERS = 2
HOT_SHARE = 0.1
LOSS_SPREAD = 0.5  # of the mean loss of two first epochs from the same weights


@dataclass(frozen=True)
class Inputs:
    """A power-law graph with features and labels, and the nodes to train on."""

    x: Tensor
    y: Tensor
    edge_index: Tensor
    seeds: Tensor
    device: torch.device


def cases(options: Options) -> Iterator[Case]:
    """Rows of 512 bytes and of 2 KiB."""
    num_nodes, num_edges, num_seeds = options.pick(
        full=(10**6, 10**7, 10**5), quick=(10**4, 10**5, 4 * BATCH)
    )
    for dim in options.pick(full=(128, 512), quick=(128,)):
        fanouts = "-".join(map(str, FANOUTS))
        yield Case(
            size=f"GraphSAGE epoch nodes={num_nodes} edges={num_edges} dim={dim} "
            f"seeds={num_seeds} batch={BATCH} fanouts={fanouts}",
            group="GraphSAGE epoch",
            inputs=partial(make_inputs, num_nodes, num_edges, dim, num_seeds, options.device),
            providers=(
                Provider("pattern of PyG's: CPU gather, then copy", _cpu_gather),
                Provider("PyG NeighborLoader + PrefetchLoader", _pyg),
                Provider("dataeff", partial(_ours, 0.0), role="ours"),
                Provider("dataeff 10 % hot", partial(_ours, HOT_SHARE), role="ours"),
            ),
            same=_assert_same_task,
        )


def make_inputs(
    num_nodes: int, num_edges: int, dim: int, num_seeds: int, device: torch.device
) -> Inputs:
    """Labels are the largest of the first features, so that there is something to learn."""
    from dataeff.bench.sample import power_law_edges

    x = torch.randn(num_nodes, dim)
    return Inputs(
        x=x,
        y=x[:, :NUM_CLASSES].argmax(1),
        edge_index=power_law_edges(num_nodes, num_edges),
        seeds=torch.randperm(num_nodes)[:num_seeds],
        device=device,
    )


def _assert_same_task(expected: tuple[int, float], actual: tuple[int, float]) -> None:
    assert actual[0] == expected[0], f"trained on {actual[0]} seeds, not {expected[0]}"
    difference = abs(actual[1] - expected[1])
    assert difference <= LOSS_SPREAD * expected[1], f"mean loss {actual[1]}, not {expected[1]}"


def _require_pyg() -> None:
    if find_spec("torch_geometric") is None:
        raise Unavailable("the package torch_geometric is not installed")


def _model(inputs: Inputs) -> torch.nn.Module:
    from torch_geometric.nn import GraphSAGE

    model: torch.nn.Module = GraphSAGE(inputs.x.shape[1], HIDDEN, len(FANOUTS), NUM_CLASSES)
    return model.to(inputs.device)


def _training(
    inputs: Inputs, loader: Iterable[Any], close: Callable[[], object] | None = None
) -> Step:
    """One call is an epoch; gives how many seeds it trained on, and their mean loss."""
    model = _model(inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def epoch() -> tuple[int, float]:
        num_seeds, total = 0, torch.zeros((), device=inputs.device)
        for batch in loader:
            scores = model(batch.x, batch.edge_index)[: batch.batch_size]
            loss = F.cross_entropy(scores, batch.y[: batch.batch_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            num_seeds += batch.batch_size
            total += loss.detach() * batch.batch_size
        return num_seeds, total.item() / num_seeds

    return Step(epoch, close=close)


def _data(inputs: Inputs, x: Any) -> Any:
    from torch_geometric.data import Data

    return Data(x=x, y=inputs.y, edge_index=inputs.edge_index, num_nodes=len(inputs.x))


def _our_loader(inputs: Inputs, x: Any, device: torch.device | None) -> Any:
    from dataeff.integrations.pyg import NeighborLoader

    return NeighborLoader(
        _data(inputs, x),
        num_neighbors=FANOUTS,
        batch_size=BATCH,
        input_nodes=inputs.seeds,
        shuffle=True,
        num_workers=NUM_WORKERS,
        device=device,
    )


def _cpu_gather(inputs: Inputs) -> Step:
    """The same threads sample and gather by plain indexing; the batch is then copied over."""
    _require_pyg()
    from torch_geometric.loader import PrefetchLoader

    return _training(inputs, PrefetchLoader(_our_loader(inputs, inputs.x, None), inputs.device))


def _pyg(inputs: Inputs) -> Step:
    _require_pyg()
    from torch_geometric import typing
    from torch_geometric.loader import NeighborLoader, PrefetchLoader

    if not (typing.WITH_PYG_LIB or typing.WITH_TORCH_SPARSE):
        raise Unavailable("PyG samples with pyg-lib or torch-sparse, and neither is installed")
    loader = NeighborLoader(
        _data(inputs, inputs.x),
        num_neighbors=FANOUTS,
        batch_size=BATCH,
        input_nodes=inputs.seeds,
        shuffle=True,
        num_workers=NUM_WORKERS,
        persistent_workers=True,
    )
    return _training(inputs, PrefetchLoader(loader, inputs.device))


def _ours(hot_share: float, inputs: Inputs) -> Step:
    _require_pyg()
    hot = None
    if hot_share:
        if inputs.device.type != "cuda":
            raise Unavailable("there is no GPU to keep rows on")
        score = weighted_reverse_pagerank(inputs.edge_index, len(inputs.x), inputs.seeds)
        hot = dataeff.HotRows(int(hot_share * len(inputs.x)), score)
    table = dataeff.FeatureTable(inputs.x, hot=hot)
    return _training(inputs, _our_loader(inputs, table, inputs.device), table.close)
