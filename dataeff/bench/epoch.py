"""An epoch of GraphSAGE on a graph whose features stay in host memory, and its batches alone.

PyG's loader with its PrefetchLoader is the peer: it samples in worker processes, gathers rows on
the CPU and copies them over. It needs pyg-lib or torch-sparse; the pattern of it, with the sampler
of this project in its place, runs everywhere and shows what the gather alone brings. Features are
taken not to fit the GPU: no provider keeps more than a tenth of them there.

Two kinds of case. `epoch's batches` are sampled, gathered and delivered, and nothing is trained on
them: the time is that of the data. `epoch, trained` runs the model too; where that is a CPU, which
has the batches to make as well, the model takes most of the time, the epoch is shortened, and
`waiting_share`, the share of it in which the model stood still for its next batch, bounds what any
loader could have gained.

Samples differ by chance, so what is compared is that every seed came by, and, of an epoch that was
trained, that the loss is that of the same model on the same task, within what chance does to it.
"""

from __future__ import annotations

import time
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
# Seconds of timing a case.
BUDGET_S = 8.0
LOSS_SPREAD = 0.5  # of the mean loss of two first epochs from the same weights

Run = Callable[..., Step]  # what is done with the batches of a loader


@dataclass(frozen=True)
class Inputs:
    """A power-law graph with features and labels, and the nodes to train on."""

    x: Tensor
    y: Tensor
    edge_index: Tensor
    seeds: Tensor
    device: torch.device


def cases(options: Options) -> Iterator[Case]:
    """An epoch trained on rows of 512 bytes; batches of these alone, and of rows of 2 KiB."""
    num_nodes, num_edges = options.pick(full=(10**6, 10**7), quick=(10**4, 10**5))
    on_gpu = options.device.type == "cuda"
    num_seeds = options.pick(full=10**5 if on_gpu else 8 * BATCH, quick=4 * BATCH)
    size = _size("epoch, trained", num_nodes, num_edges, 128, num_seeds)
    yield _case("GraphSAGE epoch, trained", size, _training, _assert_same_task, options)

    for dim in options.pick(full=(128, 512), quick=(128,)):
        num_seeds = options.pick(full=16 * BATCH, quick=4 * BATCH)
        size = _size("epoch's batches", num_nodes, num_edges, dim, num_seeds)
        yield _case("GraphSAGE epoch's batches", size, _batches, _assert_same_seeds, options)


def _size(what: str, num_nodes: int, num_edges: int, dim: int, num_seeds: int) -> dict[str, Any]:
    return {"what": what, "nodes": num_nodes, "edges": num_edges, "dim": dim, "seeds": num_seeds}


def _case(
    group: str,
    size: dict[str, Any],
    run: Run,
    same: Callable[[Any, Any], None],
    options: Options,
) -> Case:
    numbers = " ".join(f"{name}={value}" for name, value in size.items() if name != "what")
    fanouts = "-".join(map(str, FANOUTS))
    return Case(
        size=f"GraphSAGE {size['what']} {numbers} batch={BATCH} fanouts={fanouts}",
        group=group,
        inputs=partial(
            make_inputs, size["nodes"], size["edges"], size["dim"], size["seeds"], options.device
        ),
        providers=(
            Provider("pattern of PyG's: CPU gather, then copy", partial(_cpu_gather, run)),
            Provider("PyG NeighborLoader + PrefetchLoader", partial(_pyg, run)),
            Provider("dataeff", partial(_ours, run, 0.0), role="ours"),
            Provider("dataeff 10 % hot", partial(_ours, run, HOT_SHARE), role="ours"),
            Provider("dataeff, sampled on the GPU", partial(_on_gpu, run), role="ours"),
        ),
        same=same,
        budget_s=BUDGET_S,
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


def _assert_same_seeds(expected: tuple[int, float], actual: tuple[int, float]) -> None:
    assert actual[0] == expected[0], f"{actual[0]} seeds came by, not {expected[0]}"
    # The order of the batches is that of the sum.
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-2)


def _require_pyg() -> None:
    if find_spec("torch_geometric") is None:
        raise Unavailable("the package torch_geometric is not installed")


def _model(inputs: Inputs) -> torch.nn.Module:
    from torch_geometric.nn import GraphSAGE

    model: torch.nn.Module = GraphSAGE(inputs.x.shape[1], HIDDEN, len(FANOUTS), NUM_CLASSES)
    return model.to(inputs.device)


def _batches(
    inputs: Inputs, loader: Iterable[Any], close: Callable[[], object] | None = None
) -> Step:
    """One call is an epoch untrained; gives how many seeds came by, and the sum of their rows."""

    def epoch() -> tuple[int, float]:
        num_seeds, total = 0, torch.zeros((), dtype=torch.float64, device=inputs.device)
        for batch in loader:
            total += batch.x[: batch.batch_size].sum(dtype=torch.float64)
            num_seeds += batch.batch_size
        return num_seeds, total.item()

    return Step(epoch, close=close)


def _training(
    inputs: Inputs, loader: Iterable[Any], close: Callable[[], object] | None = None
) -> Step:
    """One call is an epoch; gives how many seeds it trained on, and their mean loss."""
    model = _model(inputs)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    waited_s, elapsed_s = 0.0, 0.0

    def epoch() -> tuple[int, float]:
        nonlocal waited_s, elapsed_s
        begin_s = time.perf_counter()
        num_seeds, total = 0, torch.zeros((), device=inputs.device)
        batches = iter(loader)
        while True:
            asked_s = time.perf_counter()
            batch = next(batches, None)
            waited_s += time.perf_counter() - asked_s
            if batch is None:
                break
            scores = model(batch.x, batch.edge_index)[: batch.batch_size]
            loss = F.cross_entropy(scores, batch.y[: batch.batch_size])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            num_seeds += batch.batch_size
            total += loss.detach() * batch.batch_size
        mean_loss = total.item() / num_seeds  # waits for the device
        elapsed_s += time.perf_counter() - begin_s
        return num_seeds, mean_loss

    def metrics() -> dict[str, tuple[float, str]]:
        return {"waiting_share": (waited_s / elapsed_s, "1")}

    return Step(epoch, close=close, metrics=metrics)


def _data(inputs: Inputs, x: Any) -> Any:
    from torch_geometric.data import Data

    return Data(x=x, y=inputs.y, edge_index=inputs.edge_index, num_nodes=len(inputs.x))


def _our_loader(
    inputs: Inputs, x: Any, device: torch.device | None, seeds: Tensor | None = None
) -> Any:
    from dataeff.integrations.pyg import NeighborLoader

    return NeighborLoader(
        _data(inputs, x),
        num_neighbors=FANOUTS,
        batch_size=BATCH,
        input_nodes=inputs.seeds if seeds is None else seeds,
        shuffle=True,
        num_workers=NUM_WORKERS,
        device=device,
    )


def _cpu_gather(run: Run, inputs: Inputs) -> Step:
    """The same threads sample and gather by plain indexing; the batch is then copied over."""
    _require_pyg()
    from torch_geometric.loader import PrefetchLoader

    return run(inputs, PrefetchLoader(_our_loader(inputs, inputs.x, None), inputs.device))


def _pyg(run: Run, inputs: Inputs) -> Step:
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
    return run(inputs, PrefetchLoader(loader, inputs.device))


def _ours(run: Run, hot_share: float, inputs: Inputs) -> Step:
    _require_pyg()
    hot = None
    if hot_share:
        if inputs.device.type != "cuda":
            raise Unavailable("there is no GPU to keep rows on")
        score = weighted_reverse_pagerank(inputs.edge_index, len(inputs.x), inputs.seeds)
        hot = dataeff.HotRows(int(hot_share * len(inputs.x)), score)
    table = dataeff.FeatureTable(inputs.x, hot=hot)
    return run(inputs, _our_loader(inputs, table, inputs.device), table.close)


def _on_gpu(run: Run, inputs: Inputs) -> Step:
    """Kernels sample, reading the graph in host memory, where the others' threads do."""
    _require_pyg()
    if inputs.device.type != "cuda":
        raise Unavailable("there is no GPU to sample on")
    table = dataeff.FeatureTable(inputs.x)
    loader = _our_loader(inputs, table, inputs.device, inputs.seeds.to(inputs.device))
    return run(inputs, loader, table.close)
