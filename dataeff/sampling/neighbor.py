"""Sampled neighbourhoods of one node set, its edges typed or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from dataeff import _core
from dataeff._flags import checked_bool
from dataeff._integers import checked_int
from dataeff.memory.own_pages import move_to_own_pages
from dataeff.sampling.csc import CSCGraph, id_tensor
from dataeff.sampling.on_device import DeviceSampler, Relation

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


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first byte, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


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
            if fanout < -1:
                raise ValueError(f"fan-out {fanout} of hop {hop} is below -1, which means all")
        if isinstance(entry, Sequence) and len(per_type) != num_relations:
            raise ValueError(
                f"hop {hop} has {len(per_type)} fan-outs but the graph has "
                f"{num_relations or 'no'} relations"
            )
        checked.append([index(fanout) for fanout in per_type])
    if not checked:
        raise ValueError("fanouts must name at least one hop")
    return checked


def relation_spec(
    graph: CSCGraph, fanouts: list[list[int]], src_type: int = 0, dst_type: int = 0
) -> _core.RelationSpec:
    """What the core needs to know of one relation; `graph` must outlive the sampler."""
    if torch.cuda.is_available():  # a sampler of seeds there will register the graph's memory
        for values in graph.arrays():
            move_to_own_pages(values)
    return _core.RelationSpec(
        src_type=src_type,
        dst_type=dst_type,
        colptr=address(graph.colptr),
        row=address(graph.row),
        e_id=address(graph.e_id),
        etype=address(graph.edge_type),
        weight=address(graph.edge_weight),
        time=address(graph.edge_time),
        fanouts=fanouts,
    )


class NeighborSampler:
    """Samples the multi-hop neighbourhood of seed nodes (GraphSAGE, arXiv 1706.02216, section 3.1).

    For each node that hop `h` starts from, `fanouts[h]` of the edges into it are taken: all when
    there are no more than that, else uniformly without replacement (or with, see `replace`). When
    the graph has weights, edges are drawn in proportion to them; when it has times, only edges not
    later than the seed's time are taken, and each seed grows a tree of its own.

    The random numbers are a hash of (seed, hop, node, slot): the same seed gives the same sample
    whatever the number of threads. Samplers may be pickled, and shared by threads.

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
        self.replace = checked_bool("replace", replace)
        self.disjoint = checked_bool("disjoint", disjoint) or graph.edge_time is not None
        self.last = checked_bool("last", last)
        self.induced = checked_bool("induced", induced)
        self.seed = checked_int("seed", seed)
        check_options(graph, self.fanouts, replace=replace, last=last, induced=induced)
        self._begin()

    def _begin(self) -> None:
        self._core = self._make_core() if self.graph.device.type == "cpu" else None
        self._by_device: dict[torch.device, DeviceSampler] = {}

    def _make_core(self) -> _core.NeighborSampler:
        return _core.NeighborSampler(
            id_nbytes=self.graph.index_dtype.itemsize,
            num_nodes=[self.graph.num_dst_nodes],
            relations=[relation_spec(self.graph, self.fanouts)],
            num_hops=len(self.fanouts),
            replace=self.replace,
            disjoint=self.disjoint,
            last=self.last,
            induced=self.induced,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def on_device(self, device: torch.device) -> DeviceSampler:
        """The sampler of seeds on `device`; the first call registers a graph in host memory."""
        if device not in self._by_device:
            self._by_device[device] = DeviceSampler(
                [Relation(self.graph, self.fanouts)],
                [self.graph.num_dst_nodes],
                device,
                replace=self.replace,
                disjoint=self.disjoint,
                last=self.last,
                induced=self.induced,
            )
        return self._by_device[device]

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
            TypeError: seeds are neither int32 nor int64, or `seed` is no integer.
            ValueError: the graph has times and `seed_time` is missing, or the other way round; the
                graph is on another device than the seeds and not in host memory.
            RuntimeError: the graph cannot be registered with CUDA.
        """
        seeds = id_tensor("seeds", seeds, on_host=False).long()
        if (seed_time is None) != (self.graph.edge_time is None):
            raise ValueError("seed_time is needed for a graph with edge_time, and only there")
        if seed_time is not None:
            seed_time = checked_seed_time(seed_time, seeds)
        random_seed = index(self.seed if seed is None else seed) % 2**64
        if seeds.device.type != "cpu":
            return self._sample_on_device(seeds, seed_time, random_seed)
        threads = torch.get_num_threads() if num_threads is None else num_threads
        drawn = core_on_host(self._core, self.graph).sample(
            seeds=[(seeds.data_ptr(), address(seed_time), seeds.numel())],
            random_seed=random_seed,
            num_threads=threads,
        )
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


def core_on_host(core: _core.NeighborSampler | None, graph: CSCGraph) -> _core.NeighborSampler:
    """The host's sampler, or ValueError where the graph is out of its reach."""
    if core is None:
        raise ValueError(f"seeds are on cpu but the graph is on {graph.device}: move the seeds")
    return core


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
    if seed_time.dtype.is_floating_point:
        raise TypeError(f"seed_time must be an integer tensor, not {seed_time.dtype}")
    if seed_time.shape != seeds.shape:
        raise ValueError(f"{seeds.numel()} seeds but seed_time of shape {tuple(seed_time.shape)}")
    return seed_time.to(seeds.device, torch.int64).contiguous()


def read_nodes(
    drawn: _core.Sample, node_type: int, disjoint: bool, threads: int
) -> tuple[Tensor, Tensor | None]:
    """The nodes of one type: global ids, and the tree of each when trees are disjoint."""
    n_id = torch.empty(sum(drawn.nodes_per_hop(node_type)), dtype=torch.int64, device="cpu")
    batch = torch.empty_like(n_id) if disjoint else None
    drawn.write_nodes(type=node_type, id=address(n_id), tree=address(batch), num_threads=threads)
    return n_id, batch


def read_edges(
    drawn: _core.Sample, relation: int, typed: bool, threads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The edges of one relation: local ids of both ends, edge ids, edge types."""
    num_edges = sum(drawn.edges_per_hop(relation))
    edge_index = torch.empty(2, num_edges, dtype=torch.int64, device="cpu")
    e_id = torch.empty(num_edges, dtype=torch.int64, device="cpu")
    edge_type = torch.empty(num_edges, dtype=torch.int64, device="cpu") if typed else None
    drawn.write_edges(
        relation=relation,
        src=address(edge_index),
        dst=address(edge_index) + num_edges * 8,
        e_id=address(e_id),
        etype=address(edge_type),
        num_threads=threads,
    )
    return edge_index, e_id, edge_type
