"""Sampling neighbourhoods of a power-law graph: ours beside other libraries and plain torch.

The graph is directed, sources and targets drawn by a power law of their rank (exponent 0.6 of the
rank, so that the largest degrees are thousands of times the mean) and ids shuffled, so that hubs
are not neighbours in memory. All providers read the same CSC arrays and sample without replacement,
uniformly or in proportion to weights. Samples differ by chance, so what is compared is what does
not: the numbers of edges of the first hop, and that every edge exists. DGL samples the nodes of
earlier hops again in later ones, so its samples have more edges (`edges_per_batch`).

After the samples come epochs of GraphSAGE (`dataeff.bench.epoch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from dataeff.bench import epoch
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.dgl import import_dgl
from dataeff.sampling import CSCGraph, NeighborSampler

NUM_BATCHES = 16
EXPONENT = 0.6
FANOUTS = (15, 10, 5)
# Seconds of timing a case.
BUDGET_S = 8.0


@dataclass(frozen=True)
class Inputs:
    """A graph, batches of seeds, and edges to take per hop."""

    graph: CSCGraph
    batches: list[Tensor]
    fanouts: tuple[int, ...]

    @cached_property
    def edge_keys(self) -> Tensor:
        """Every edge as target * num_nodes + source, rising."""
        graph = self.graph
        targets = torch.repeat_interleave(
            torch.arange(graph.num_dst_nodes), graph.colptr.diff().long()
        )
        return (targets * graph.num_src_nodes + graph.row).sort().values


@dataclass(frozen=True)
class Sampled:
    """One provider's sample: global node ids, local ends of edges.

    `num_first` edges are of the first hop, where later hops sample its nodes again.
    """

    seeds: Tensor
    n_id: Tensor
    row: Tensor
    col: Tensor
    num_first: int | None = None

    def on_host(self) -> Sampled:
        """The same, its lists on the CPU."""
        lists = {name: getattr(self, name).cpu() for name in ("seeds", "n_id", "row", "col")}
        return replace(self, **lists)


def cases(options: Options) -> Iterator[Case]:
    """Batches of growing size; one thread and all; a graph smaller than the caches and one not."""
    sizes = options.pick(full=((10**5, 10**6), (10**6, 10**7)), quick=((10**5, 10**6),))
    for num_nodes, num_edges in sizes:
        # Made once, with the first of its cases, and dropped after the last.
        graph = cache(partial(power_law_graph, num_nodes, num_edges))
        for batch in options.pick(full=(128, 1024), quick=(1024,)):
            yield _case(options, graph, batch, f"nodes={num_nodes} edges={num_edges}", "")
    num_nodes, num_edges = sizes[-1]
    weighted = partial(power_law_graph, num_nodes, num_edges, weighted=True)
    yield _case(options, weighted, 1024, f"nodes={num_nodes} edges={num_edges}", "weighted ")
    yield from epoch.cases(options)


def _case(
    options: Options, graph: Callable[[], CSCGraph], batch: int, size: str, kind: str
) -> Case:
    return Case(
        size=f"{kind}{size} batch={batch} fanouts={'-'.join(map(str, FANOUTS))}",
        group=f"{kind}neighbour sampling",
        inputs=partial(make_inputs, graph, batch, FANOUTS),
        providers=(
            Provider("plain torch", _plain),
            Provider("torch-sparse", _torch_sparse),
            Provider("DGL", _dgl, requires=("dgl",)),
            Provider("pyg-lib", _pyg_lib, requires=("pyg_lib",)),
            Provider("dataeff 1 thread", partial(_ours, num_threads=1), role="ours"),
            Provider("dataeff", partial(_ours, num_threads=None), role="ours"),
            Provider("dataeff on the GPU", partial(_on_gpu, options.device), role="ours"),
        ),
        same=_assert_plausible,
        budget_s=BUDGET_S,
    )


def power_law_edges(num_nodes: int, num_edges: int) -> Tensor:
    """Ends drawn with odds of rank^-EXPONENT, ranks shuffled over the ids; [2, num_edges]."""
    # The inverse of the cumulated odds: rank = num_nodes * u^(1 / (1 - EXPONENT)).
    u = torch.rand(2, num_edges, dtype=torch.float64)
    rank = (num_nodes * u.pow(1 / (1 - EXPONENT))).long().clamp(max=num_nodes - 1)
    return torch.stack([torch.randperm(num_nodes)[ends] for ends in rank])


def power_law_graph(num_nodes: int, num_edges: int, weighted: bool = False) -> CSCGraph:
    """The graph of `power_law_edges`; weights of its edges are uniform in [0.1, 1.1)."""
    edges = power_law_edges(num_nodes, num_edges)
    weight = torch.rand(num_edges, dtype=torch.float64) + 0.1 if weighted else None
    return CSCGraph(edges, num_nodes=num_nodes, edge_weight=weight)


def make_inputs(make_graph: Callable[[], CSCGraph], batch: int, fanouts: tuple[int, ...]) -> Inputs:
    """The graph and `NUM_BATCHES` batches of distinct seeds."""
    graph = make_graph()
    batches = [torch.randperm(graph.num_dst_nodes)[:batch] for _ in range(NUM_BATCHES)]
    return Inputs(graph, batches, fanouts)


def _step(inputs: Inputs, sample: Callable[[Tensor, int], Sampled]) -> Step:
    """Goes through the batches, round and round; the last sample's size is a metric."""
    calls = 0
    num_edges = 0

    def call() -> tuple[Inputs, Sampled]:
        nonlocal calls, num_edges
        drawn = sample(inputs.batches[calls % NUM_BATCHES], calls)
        calls += 1
        num_edges += drawn.row.numel()
        return inputs, drawn

    return Step(call, metrics=lambda: {"edges_per_batch": (num_edges / max(calls, 1), "edges")})


def _assert_plausible(expected: tuple[Inputs, Sampled], actual: tuple[Inputs, Sampled]) -> None:
    for inputs, sampled in (expected, actual):
        drawn = sampled.on_host()
        graph, first = inputs.graph, drawn.seeds.numel()
        degree = graph.colptr.diff().long()
        assert torch.equal(drawn.n_id[:first], drawn.seeds)
        assert drawn.n_id.unique().numel() == drawn.n_id.numel()
        taken = torch.bincount(drawn.col[: drawn.num_first], minlength=first)[:first]
        assert torch.equal(taken, degree[drawn.seeds].clamp(max=inputs.fanouts[0]))
        keys = drawn.n_id[drawn.col] * graph.num_src_nodes + drawn.n_id[drawn.row]
        places = torch.searchsorted(inputs.edge_keys, keys).clamp(max=len(inputs.edge_keys) - 1)
        assert torch.equal(inputs.edge_keys[places], keys)


def _ours(inputs: Inputs, num_threads: int | None) -> Step:
    sampler = NeighborSampler(inputs.graph, list(inputs.fanouts))

    def sample(seeds: Tensor, call: int) -> Sampled:
        drawn = sampler.sample(seeds, seed=call, num_threads=num_threads)
        return Sampled(seeds, drawn.n_id, drawn.edge_index[0], drawn.edge_index[1])

    return _step(inputs, sample)


def _on_gpu(device: torch.device, inputs: Inputs) -> Step:
    if device.type != "cuda":
        raise Unavailable("there is no GPU to sample on")
    sampler = NeighborSampler(inputs.graph, list(inputs.fanouts))  # the graph stays on the host
    batches = [seeds.to(device) for seeds in inputs.batches]

    def sample(_: Tensor, call: int) -> Sampled:
        seeds = batches[call % NUM_BATCHES]
        drawn = sampler.sample(seeds, seed=call)
        return Sampled(seeds, drawn.n_id, drawn.edge_index[0], drawn.edge_index[1])

    return _step(inputs, sample)


def _torch_sparse(inputs: Inputs) -> Step:
    _refuse_weights(inputs, "torch-sparse")
    _load_torch_sparse()
    colptr, row = inputs.graph.colptr.long(), inputs.graph.row.long()
    fanouts = list(inputs.fanouts)

    def sample(seeds: Tensor, call: int) -> Sampled:
        n_id, src, dst, _ = torch.ops.torch_sparse.neighbor_sample(
            colptr, row, seeds, fanouts, False, True
        )
        return Sampled(seeds, n_id, src, dst)

    return _step(inputs, sample)


def _refuse_weights(inputs: Inputs, name: str) -> None:
    if inputs.graph.edge_weight is not None:
        raise Unavailable(f"{name} is not asked to sample by weight")


def _load_torch_sparse() -> None:
    """Loads the sampler's library alone: the package itself also asks for torch-scatter."""
    spec = find_spec("torch_sparse")
    if spec is None or spec.origin is None:
        raise Unavailable("the package torch_sparse is not installed")
    libraries = sorted(Path(spec.origin).parent.glob("_neighbor_sample_c*.so"))
    if not libraries:
        raise Unavailable("the package torch_sparse holds no _neighbor_sample library")
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        raise Unavailable(f"torch_sparse does not load beside this torch: {error}") from error


def _dgl(inputs: Inputs) -> Step:
    dgl = import_dgl()
    colptr, row = inputs.graph.colptr.long(), inputs.graph.row.long()
    no_ids = torch.empty(0, dtype=torch.int64)
    graph = dgl.graph(("csc", (colptr, row, no_ids)), num_nodes=inputs.graph.num_src_nodes)
    if inputs.graph.edge_weight is not None:
        graph.edata["weight"] = inputs.graph.edge_weight
    prob = "weight" if inputs.graph.edge_weight is not None else None
    fanouts = list(reversed(inputs.fanouts))  # last hop first
    sampler = dgl.dataloading.NeighborSampler(fanouts, prob=prob)

    def sample(seeds: Tensor, call: int) -> Sampled:
        n_id, _, blocks = sampler.sample_blocks(graph, seeds)
        ends = [block.edges() for block in reversed(blocks)]  # a block's nodes begin the next one's
        row, col = (torch.cat(parts) for parts in zip(*ends, strict=True))
        return Sampled(seeds, n_id, row, col, num_first=len(ends[0][0]))

    return _step(inputs, sample)


def _pyg_lib(inputs: Inputs) -> Step:
    _refuse_weights(inputs, "pyg-lib")
    import_module("pyg_lib")  # registers torch.ops.pyg
    colptr, row = inputs.graph.colptr.long(), inputs.graph.row.long()
    fanouts = list(inputs.fanouts)

    def sample(seeds: Tensor, call: int) -> Sampled:
        src, dst, n_id, *_ = torch.ops.pyg.neighbor_sample(colptr, row, seeds, fanouts, csc=True)
        return Sampled(seeds, n_id, src, dst)

    return _step(inputs, sample)


def _plain(inputs: Inputs) -> Step:
    graph = inputs.graph
    colptr, row = graph.colptr.long(), graph.row.long()

    def sample(seeds: Tensor, call: int) -> Sampled:
        return plain_sample(colptr, row, seeds, inputs.fanouts, graph.edge_weight)

    return _step(inputs, sample)


def plain_sample(
    colptr: Tensor,
    row: Tensor,
    seeds: Tensor,
    fanouts: tuple[int, ...],
    weight: Tensor | None = None,
) -> Sampled:
    """Neighbour sampling in whole-tensor operations.

    Each edge into the frontier gets a random key, and the `fanout` smallest keys of each column are
    taken: without replacement, at the price of sorting every edge of the frontier. Uniform keys
    choose uniformly, exponential ones of rate `weight` in proportion to it (Efraimidis and
    Spirakis, IPL 97, 2006).
    """
    n_id, frontier = seeds, seeds
    local = torch.full((colptr.numel() - 1,), -1)
    local[seeds] = torch.arange(seeds.numel())
    rows, cols = [], []
    for fanout in fanouts:
        begin, degree = colptr[frontier], colptr[frontier + 1] - colptr[frontier]
        column = torch.repeat_interleave(torch.arange(frontier.numel()), degree)
        first = degree.cumsum(0) - degree
        within = torch.arange(column.numel()) - first[column]
        key = torch.rand(column.numel(), dtype=torch.float64)
        if weight is not None:
            arrival = key.exponential_() / weight[begin[column] + within]
            key = arrival / (1 + arrival)  # in the same order, and below 1 like the others
        order = (column + key).argsort()
        taken = order[(within < fanout)]  # sorted by column, so `within` counts its smallest keys
        found = row[begin[column[taken]] + within[taken]]
        new = found[local[found] < 0].unique()
        local[new] = torch.arange(n_id.numel(), n_id.numel() + new.numel())
        rows.append(local[found])
        cols.append(local[frontier[column[taken]]])
        n_id, frontier = torch.cat([n_id, new]), new
    return Sampled(seeds, n_id, torch.cat(rows), torch.cat(cols))
