"""Sampled neighbourhoods of a graph with several node sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dataeff import _core
from dataeff.sampling.csc import CSCGraph, id_tensor
from dataeff.sampling.neighbor import check_options, checked_fanouts, checked_seed_time
from dataeff.sampling.on_device import Edges, Nodes, Relation
from dataeff.sampling.sampler import Sampler, read_edges, read_nodes

EdgeType = tuple[str, str, str]


@dataclass
class HeteroSampledSubgraph:
    """As `SampledSubgraph`, by node type (n_id, batch, num_sampled_nodes) or by edge type.

    Every type of the graph has its entry, an empty one where nothing was sampled. `batch` is None
    unless the sample is disjoint; trees are numbered through all types, in the graph's order.
    """

    n_id: dict[str, Tensor]
    edge_index: dict[EdgeType, Tensor]
    e_id: dict[EdgeType, Tensor]
    batch: dict[str, Tensor] | None
    num_sampled_nodes: dict[str, list[int]]
    num_sampled_edges: dict[EdgeType, list[int]]


class HeteroNeighborSampler(Sampler):
    """Samples neighbourhoods over one CSC graph per edge type (source type, name, target type).

    At each hop and for each edge type, the nodes of its target type that the hop before reached
    take up to `fanout` of their edges, as `NeighborSampler` does for one node set; the new nodes of
    all types together start the next hop. Edge types are visited in the order of `graphs`.

    Args:
        graphs: the edges of each type; graphs of one node type must agree on its size.
        fanouts: edges to take per hop, for all edge types or for each.
        num_nodes: sizes of node types, for those that no edge type names.
        replace: with replacement.
        disjoint: a tree of its own for each seed; implied when a graph has times.
        last: take the latest edges instead of a uniform choice, of the graphs that have times.
        induced: return every edge between the sampled nodes instead of those taken.
        seed: random seed of samples that do not name their own.

    Raises:
        TypeError: a fan-out is not an integer, a flag no bool, or a graph no `CSCGraph`.
        ValueError: graphs disagree on a number of nodes, fan-outs are missing or of several
            lengths, an edge type has not three parts, or the options contradict one another.
    """

    def __init__(
        self,
        graphs: Mapping[EdgeType, CSCGraph],
        fanouts: Sequence[int] | Mapping[EdgeType, Sequence[int]],
        *,
        num_nodes: Mapping[str, int] | None = None,
        replace: bool = False,
        disjoint: bool = False,
        last: bool = False,
        induced: bool = False,
        seed: int = 0,
    ) -> None:
        _check_graphs(graphs)
        wide = any(graph.index_dtype == torch.int64 for graph in graphs.values())
        index_dtype = torch.int64 if wide else torch.int32
        self.graphs = {key: graph.with_index_dtype(index_dtype) for key, graph in graphs.items()}
        self.num_nodes = _sizes_of(self.graphs, num_nodes or {})
        self.fanouts = _fanouts_by_type(self.graphs, fanouts)
        self.temporal = any(graph.edge_time is not None for graph in graphs.values())
        super().__init__(
            temporal=self.temporal,
            replace=replace,
            disjoint=disjoint,
            last=last,
            induced=induced,
            seed=seed,
        )
        if last and not self.temporal:
            raise ValueError("last=True takes the latest edges, but no graph has edge_time")
        for key, graph in self.graphs.items():
            latest = last and graph.edge_time is not None
            check_options(graph, self.fanouts[key], replace=replace, last=latest, induced=induced)
        self._begin()

    def _relations(self) -> list[Relation]:
        place = {node_type: i for i, node_type in enumerate(self.num_nodes)}
        return [
            Relation(graph, self.fanouts[key], place[key[0]], place[key[2]])
            for key, graph in self.graphs.items()
        ]

    def _sizes(self) -> list[int]:
        return list(self.num_nodes.values())

    def sample(
        self,
        seeds: Mapping[str, Tensor],
        *,
        seed: int | None = None,
        seed_time: Mapping[str, Tensor] | None = None,
        num_threads: int | None = None,
    ) -> HeteroSampledSubgraph:
        """Samples the neighbourhood of `seeds`.

        Args:
            seeds: node ids by node type, each [num_seeds], int32/int64, on one device. There the
                sample is drawn and stays: on CUDA, kernels read the graphs in place.
            seed: random seed, by default the sampler's own.
            seed_time: latest time of the edges in each seed's tree, by node type.
            num_threads: threads that share the work, by default torch's number.

        Raises:
            IndexError: a seed is not a node of its type.
            KeyError: a node type is not in the graph.
            TypeError: seeds are neither int32 nor int64, or do not go by type; `seed` or
                `num_threads` is no integer.
            ValueError: graphs have times and `seed_time` is missing, or the other way round;
                `num_threads` is not positive.
        """
        _check_by_type("seeds", seeds)
        if seed_time is not None:
            _check_by_type("seed_time", seed_time)
        if unknown := set(seeds) - set(self.num_nodes):
            raise KeyError(
                f"seeds of types {sorted(unknown)}, but there are {list(self.num_nodes)}"
            )
        if (seed_time is None) == self.temporal:
            raise ValueError("seed_time is needed for graphs with edge_time, and only there")
        device = _one_device(seeds)
        none = torch.empty(0, dtype=torch.int64, device=device)
        ids = [
            id_tensor(f"seeds[{t!r}]", seeds.get(t, none), on_host=False).long()
            for t in self.num_nodes
        ]
        times: list[Tensor | None] = [None] * len(ids)
        if seed_time is not None:
            times = [
                checked_seed_time(seed_time.get(t, none), own)
                for t, own in zip(self.num_nodes, ids, strict=True)
            ]
        random_seed = self._random_seed(seed)
        if device.type != "cpu":
            return self._read_lists(*self.on_device(device).sample(ids, times, random_seed))
        threads = self._threads(num_threads)
        drawn = self._draw_on_host(ids, times, random_seed, threads)
        return self._read(drawn, threads)

    def _read_lists(self, nodes: list[Nodes], edges: list[Edges]) -> HeteroSampledSubgraph:
        by_type = dict(zip(self.num_nodes, nodes, strict=True))
        by_edge = dict(zip(self.graphs, edges, strict=True))
        read = {key: one.read(self.graphs[key]) for key, one in by_edge.items()}
        return HeteroSampledSubgraph(
            n_id={key: one.id for key, one in by_type.items()},
            edge_index={key: edge_index for key, (edge_index, _, _) in read.items()},
            e_id={key: e_id for key, (_, e_id, _) in read.items()},
            batch={key: one.tree for key, one in by_type.items() if one.tree is not None}
            if self.disjoint
            else None,
            num_sampled_nodes={key: one.per_hop for key, one in by_type.items()},
            num_sampled_edges={key: one.per_hop for key, one in by_edge.items()},
        )

    def _read(self, drawn: _core.Sample, threads: int) -> HeteroSampledSubgraph:
        nodes = {
            node_type: read_nodes(drawn, i, self.disjoint, threads)
            for i, node_type in enumerate(self.num_nodes)
        }
        edges = {key: read_edges(drawn, i, False, threads) for i, key in enumerate(self.graphs)}
        return HeteroSampledSubgraph(
            n_id={key: n_id for key, (n_id, _) in nodes.items()},
            edge_index={key: edge_index for key, (edge_index, _, _) in edges.items()},
            e_id={key: e_id for key, (_, e_id, _) in edges.items()},
            batch={key: batch for key, (_, batch) in nodes.items() if batch is not None}
            if self.disjoint
            else None,
            num_sampled_nodes={key: drawn.nodes_per_hop(i) for i, key in enumerate(nodes)},
            num_sampled_edges={key: drawn.edges_per_hop(i) for i, key in enumerate(edges)},
        )


def _check_graphs(graphs: Mapping[EdgeType, CSCGraph]) -> None:
    if not isinstance(graphs, Mapping):
        raise TypeError(f"graphs go by edge type, {{type: CSCGraph}}, got {type(graphs).__name__}")
    if not graphs:
        raise ValueError("a heterogeneous graph needs at least one edge type")
    for key, graph in graphs.items():
        if not isinstance(key, tuple) or len(key) != 3:
            raise ValueError(f"an edge type is (source type, name, target type), got {key!r}")
        if not isinstance(graph, CSCGraph):
            raise TypeError(f"graph {key} is a {type(graph).__name__}: make a CSCGraph(edge_index)")


def _check_by_type(name: str, values: Any) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} of several types go by type, got {type(values).__name__}")


def _one_device(seeds: Mapping[str, Tensor]) -> torch.device:
    devices = {ids.device for ids in seeds.values() if isinstance(ids, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"seeds are on {sorted(map(str, devices))}: bring them to one device")
    return devices.pop() if devices else torch.device("cpu")


def _sizes_of(graphs: Mapping[EdgeType, CSCGraph], others: Mapping[str, int]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for key, graph in graphs.items():
        for node_type, size in ((key[0], graph.num_src_nodes), (key[2], graph.num_dst_nodes)):
            if sizes.setdefault(node_type, size) != size:
                raise ValueError(
                    f"{key} has {size} nodes of type {node_type!r}, other edge types have "
                    f"{sizes[node_type]}: give each CSCGraph num_nodes=(sources, targets)"
                )
    for node_type, size in others.items():
        if sizes.setdefault(node_type, size) != size:
            raise ValueError(
                f"num_nodes has {size} nodes of type {node_type!r}, the graphs {sizes[node_type]}"
            )
    return sizes


def _fanouts_by_type(
    graphs: Mapping[EdgeType, CSCGraph],
    fanouts: Sequence[int] | Mapping[EdgeType, Sequence[int]],
) -> dict[EdgeType, list[list[int]]]:
    if not isinstance(fanouts, Mapping):
        fanouts = dict.fromkeys(graphs, fanouts)
    if set(fanouts) != set(graphs):
        raise ValueError(
            f"fan-outs for {list(fanouts)}, but the graph's edge types are {list(graphs)}"
        )
    if len({len(own) for own in fanouts.values()}) != 1:
        raise ValueError("every edge type needs a fan-out for the same number of hops")
    return {key: checked_fanouts(fanouts[key], None) for key in graphs}
