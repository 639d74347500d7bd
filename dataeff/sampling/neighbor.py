"""Sampled neighbourhoods of one node set, its edges typed or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

from dataeff.sampling.csc import CSCGraph, id_tensor
from dataeff.sampling.on_device import Relation
from dataeff.sampling.sampler import Sampler, read_edges, read_nodes

Fanouts = Sequence[int | Sequence[int]]


@dataclass
class SampledSubgraph:
    """The edges through which information reaches the seeds, with nodes numbered from 0.

    Attributes:
        n_id: global ids of the nodes, [num_nodes], int64; the seeds first, in the order given,
            then the others in order of discovery.
        edge_index: local ids, [2, num_edges], int64; row 0 is the source (the sampled neighbour),
            row 1 the target. Edges of one hop are contiguous and their targets ascend.
        e_id: which edge of the graph each one is, [num_edges], int64.
        edge_type: relation of each edge, [num_edges], int64, or None.
        batch: the seed whose tree each node belongs to, [num_nodes], int64; None unless disjoint.
        num_sampled_nodes: the seeds, then the nodes that each hop added.
        num_sampled_edges: edges per hop; of an induced sample, all of them as one.
    """

    n_id: Tensor
    edge_index: Tensor
    e_id: Tensor
    edge_type: Tensor | None
    batch: Tensor | None
    num_sampled_nodes: list[int]
    num_sampled_edges: list[int]

    @property
    def num_seeds(self) -> int:
        """Seeds are local nodes 0 ... num_seeds - 1."""
        return self.num_sampled_nodes[0]


def checked_fanouts(fanouts: Fanouts, num_relations: int | None) -> list[list[int]]:
    """Brings fan-outs to one list per hop, of one number or of one per relation.

    Raises:
        TypeError: a fan-out is not an integer, or there is no list of them.
        ValueError: a fan-out is below -1, or a hop has not one number per relation.
    """
    if not isinstance(fanouts, Sequence):
        raise TypeError(
            f"fanouts are a list with one entry per hop, such as [15, 10], got {fanouts!r}"
        )
    checked = []
    for hop, entry in enumerate(fanouts):
        per_type: list[int] = list(entry) if isinstance(entry, Sequence) else [entry]
        for fanout in per_type:
            if not isinstance(fanout, SupportsIndex) or isinstance(fanout, (bool, Tensor)):
                raise TypeError(f"fan-out {fanout!r} of hop {hop} is not an integer")
            if not -1 <= fanout < 2**63:
                kind = "below -1, which" if fanout < 0 else "past 2^63: -1"
                raise ValueError(f"fan-out {fanout} of hop {hop} is {kind} means all")
        if isinstance(entry, Sequence) and len(per_type) != num_relations:
            raise ValueError(
                f"hop {hop} has {len(per_type)} fan-outs but the graph has "
                f"{num_relations or 'no'} relations"
            )
        checked.append([index(fanout) for fanout in per_type])
    if not checked:
        raise ValueError("fanouts must name at least one hop")
    return checked


class NeighborSampler(Sampler):
    """Samples the multi-hop neighbourhood of seed nodes (GraphSAGE, arXiv 1706.02216, section 3.1).

    For each node that hop `h` starts from, `fanouts[h]` of the edges into it are taken: all when
    there are no more than that, else uniformly without replacement (or with, see `replace`). When
    the graph has weights, edges are drawn in proportion to them; when it has times, only edges not
    later than the seed's time are taken, and each seed grows a tree of its own.

    The random numbers are a hash of (seed, hop, node, slot): the same seed gives the same sample
    whatever the number of threads, so name another for each batch of a training. Samplers may be
    pickled, and shared by threads.

    Args:
        graph: the graph; it is not copied.
        fanouts: edges to take per hop, or per hop and relation; -1 takes all.
        replace: take exactly `fanouts[h]` edges, the same one perhaps several times, wherever there
            is one to take.
        disjoint: keep the seeds' neighbourhoods apart; a node in two of them stands twice.
        last: with times, take the latest edges instead of a uniform choice.
        induced: return every edge between the sampled nodes instead of those taken.
        seed: random seed of samples that do not name their own.

    Raises:
        TypeError: a fan-out is not an integer, a flag no bool, or `graph` no `CSCGraph`.
        ValueError: fan-outs do not fit the graph, or the options contradict one another.
    """

    def __init__(
        self,
        graph: CSCGraph,
        fanouts: Fanouts,
        *,
        replace: bool = False,
        disjoint: bool = False,
        last: bool = False,
        induced: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(graph, CSCGraph):
            raise TypeError(f"graph is a {type(graph).__name__}: make a CSCGraph(edge_index)")
        if graph.num_src_nodes != graph.num_dst_nodes:
            raise ValueError(
                f"sources and targets must be one node set, but the graph has {graph.num_src_nodes}"
                f" and {graph.num_dst_nodes}: use HeteroNeighborSampler"
            )
        typed = graph.edge_type is not None
        self.graph = graph
        self.fanouts = checked_fanouts(fanouts, graph.num_relations if typed else None)
        super().__init__(
            temporal=graph.edge_time is not None,
            replace=replace,
            disjoint=disjoint,
            last=last,
            induced=induced,
            seed=seed,
        )
        check_options(graph, self.fanouts, replace=replace, last=last, induced=induced)
        self._begin()

    def _relations(self) -> list[Relation]:
        return [Relation(self.graph, self.fanouts)]

    def _sizes(self) -> list[int]:
        return [self.graph.num_dst_nodes]

    def _sample_on_device(
        self, seeds: Tensor, seed_time: Tensor | None, random_seed: int
    ) -> SampledSubgraph:
        sampler = self.on_device(seeds.device)
        [nodes], [edges] = sampler.sample([seeds], [seed_time], random_seed)
        edge_index, e_id, edge_type = edges.read(self.graph)
        return SampledSubgraph(
            n_id=nodes.id,
            edge_index=edge_index,
            e_id=e_id,
            edge_type=edge_type,
            batch=nodes.tree,
            num_sampled_nodes=nodes.per_hop,
            num_sampled_edges=edges.per_hop,
        )

    def sample(
        self,
        seeds: Tensor,
        *,
        seed: int | None = None,
        seed_time: Tensor | None = None,
        num_threads: int | None = None,
    ) -> SampledSubgraph:
        """Samples the neighbourhood of `seeds`.

        Args:
            seeds: node ids, [num_seeds], int32/int64; repeated ones are expanded each. Where they
                are, the sample is drawn and stays: on CUDA, kernels read the graph in place.
            seed: random seed, by default the sampler's own.
            seed_time: latest time of the edges in each seed's tree, [num_seeds], integers.
            num_threads: threads that share the work on the host, by default torch's number.

        Raises:
            IndexError: a seed is not a node of the graph.
            TypeError: seeds are neither int32 nor int64; `seed` or `num_threads` is no integer.
            ValueError: the graph has times and `seed_time` is missing, or the other way round; the
                graph is on another device than the seeds and not in host memory; `num_threads` is
                not positive.
            RuntimeError: the graph cannot be registered with CUDA.
        """
        seeds = id_tensor("seeds", seeds, on_host=False).long()
        if (seed_time is None) != (self.graph.edge_time is None):
            raise ValueError("seed_time is needed for a graph with edge_time, and only there")
        if seed_time is not None:
            seed_time = checked_seed_time(seed_time, seeds)
        random_seed = self._random_seed(seed)
        if seeds.device.type != "cpu":
            return self._sample_on_device(seeds, seed_time, random_seed)
        threads = self._threads(num_threads)
        drawn = self._draw_on_host([seeds], [seed_time], random_seed, threads)
        n_id, batch = read_nodes(drawn, 0, self.disjoint, threads)
        edge_index, e_id, edge_type = read_edges(
            drawn, 0, self.graph.edge_type is not None, threads
        )
        return SampledSubgraph(
            n_id=n_id,
            edge_index=edge_index,
            e_id=e_id,
            edge_type=edge_type,
            batch=batch,
            num_sampled_nodes=drawn.nodes_per_hop(0),
            num_sampled_edges=drawn.edges_per_hop(0),
        )


def check_options(
    graph: CSCGraph, fanouts: list[list[int]], *, replace: bool, last: bool, induced: bool
) -> None:
    """Refuses options that contradict one another or the graph.

    Raises:
        ValueError: which two do not go together.
    """
    if last and graph.edge_time is None:
        raise ValueError("last=True takes the latest edges, but the graph has no edge_time")
    if last and (replace or graph.edge_weight is not None):
        raise ValueError("last=True leaves nothing to chance: replace and edge_weight exclude it")
    if induced and graph.edge_time is not None:
        raise ValueError("induced=True takes all edges between nodes, so times would not hold")
    if not any(len(per_type) > 1 for per_type in fanouts):
        return
    if graph.edge_time is not None:
        raise ValueError("fan-outs per relation need edges sorted by type, times need them by time")
    if graph.edge_type is not None and not graph.sorted_in_columns(graph.edge_type):
        raise ValueError("fan-outs per relation need the edges of a column sorted by type")


def checked_seed_time(seed_time: Tensor, seeds: Tensor) -> Tensor:
    """Seed times as contiguous int64, one per seed.

    Raises:
        TypeError: they are not integers.
        ValueError: there is not one per seed.
    """
    if not isinstance(seed_time, Tensor):
        raise TypeError(f"seed_time must be a tensor, not {type(seed_time).__name__}")
    if seed_time.dtype.is_floating_point:
        raise TypeError(f"seed_time must be an integer tensor, not {seed_time.dtype}")
    if seed_time.shape != seeds.shape:
        raise ValueError(f"{seeds.numel()} seeds but seed_time of shape {tuple(seed_time.shape)}")
    return seed_time.to(seeds.device, torch.int64).contiguous()
