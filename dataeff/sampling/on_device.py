"""Sampling where the seeds are: kernels choose edges, reading the graph in place; torch relabels.

The random numbers, the choices and the order of nodes and edges are those of the host's sampler, so
a seed gives one sample on every device. All lists stay on the device; the host waits only for the
number of edges and of new nodes of each step. The same code runs on the CPU, where the tests
compare it with the host's sampler.

Source: PyTorch-Direct (arXiv 2101.07956) for reading host memory in place; the sampling is
GraphSAGE's (arXiv 1706.02216).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataeff import _core
from dataeff.features.gather import gather
from dataeff.features.registration import RegisteredMemory
from dataeff.memory.cuda import current_device, refuse_in_capture
from dataeff.sampling.csc import CSCGraph


@dataclass
class Relation:
    """Edges from nodes of type `src` to nodes of type `dst` (places in the list of node types)."""

    graph: CSCGraph
    fanouts: list[list[int]]
    src: int = 0
    dst: int = 0


@dataclass
class Nodes:
    """Nodes of one type found so far, in order of discovery; a key tells two of them apart."""

    num_nodes: int
    id: Tensor
    tree: Tensor | None
    per_hop: list[int] = field(default_factory=list)

    def key(self, ids: Tensor, tree: Tensor | None) -> Tensor:
        """What is unique to a node within a batch: its id, or its tree and its id."""
        return ids if tree is None else tree * self.num_nodes + ids

    def find_or_insert(self, ids: Tensor, tree: Tensor | None) -> Tensor:
        """Local numbers of nodes, [n], appending those not met before in the order they come."""
        known = len(self.id)
        keys = torch.cat([self.key(self.id, self.tree), self.key(ids, tree)])
        distinct, which = keys.unique(return_inverse=True)
        place = torch.arange(len(keys), device=keys.device)
        first = torch.full_like(distinct, len(keys)).scatter_reduce_(0, which, place, "amin")
        new = first[first >= known].sort().values
        rank = torch.empty(len(keys), dtype=torch.int64, device=keys.device)
        rank[:known] = place[:known]
        rank[new] = known + torch.arange(len(new), device=keys.device)
        self.id = torch.cat([self.id, ids[new - known]])
        if self.tree is not None and tree is not None:
            self.tree = torch.cat([self.tree, tree[new - known]])
        return rank[first[which[known:]]]


@dataclass
class Edges:
    """Edges of one relation: local ends and places in its CSC graph, a part for each hop."""

    src: list[Tensor] = field(default_factory=list)
    dst: list[Tensor] = field(default_factory=list)
    place: list[Tensor] = field(default_factory=list)

    @property
    def per_hop(self) -> list[int]:
        """Edges that each hop took."""
        return [len(part) for part in self.place]

    def read(self, graph: CSCGraph) -> tuple[Tensor, Tensor, Tensor | None]:
        """Local ends, [2, num_edges], edge ids and edge types, all int64."""
        place = torch.cat(self.place)
        e_id = place if graph.e_id is None else gather(graph.e_id, place).long()
        etype = None if graph.edge_type is None else gather(graph.edge_type, place).long()
        return torch.stack([torch.cat(self.src), torch.cat(self.dst)]), e_id, etype


class DeviceSampler:
    """Samples on the device of the seeds; one for each sampler and device.

    Args:
        relations: what to follow, each with its fan-outs by hop.
        num_nodes: by node type.
        device: where the lists are. A graph in host memory is registered with CUDA in place.
        replace: as for `NeighborSampler`, like `disjoint`, `last` and `induced`.
        disjoint: as there.
        last: as there.
        induced: as there.

    Raises:
        RuntimeError: CUDA refuses to register the graph; says why and what helps.
        ValueError: a graph is on another device.
    """

    def __init__(
        self,
        relations: Sequence[Relation],
        num_nodes: Sequence[int],
        device: torch.device,
        *,
        replace: bool,
        disjoint: bool,
        last: bool,
        induced: bool,
    ) -> None:
        self.relations, self.num_nodes, self.device = relations, num_nodes, device
        self.replace, self.disjoint, self.last, self.induced = replace, disjoint, last, induced
        self._registered = [
            registered for relation in relations for registered in self._readable(relation.graph)
        ]
        self._fanouts = [
            [torch.tensor(hop, dtype=torch.int64, device=device) for hop in relation.fanouts]
            for relation in relations
        ]
        self._all = torch.tensor([-1], dtype=torch.int64, device=device)

    def _readable(self, graph: CSCGraph) -> list[RegisteredMemory]:
        registered = []
        for values in graph.arrays():
            if values.device == self.device or not values.numel():
                continue
            if values.device.type != "cpu":
                raise ValueError(f"seeds are on {self.device} but the graph is on {values.device}")
            # The sampler on the CPU has the array's address.
            registered.append(RegisteredMemory(values, in_place=True))
            registered[-1].register(self.device)
        return registered

    def sample(
        self, seeds: Sequence[Tensor], seed_time: Sequence[Tensor | None], random_seed: int
    ) -> tuple[list[Nodes], list[Edges]]:
        """Samples the neighbourhood of `seeds` (int64, by node type), as `NeighborSampler.sample`.

        Raises:
            IndexError: a seed is not a node.
            RuntimeError: a CUDA graph is being captured.
        """
        if self.device.type == "cuda":
            refuse_in_capture("the number of nodes of a sample", "sample before the capture")
        for registered in self._registered:
            registered.register(self.device)  # again where torch has moved it for another process
        nodes, until = self._begin(seeds, seed_time)
        edges = [Edges() for _ in self.relations]
        frontier = [(0, len(one.id)) for one in nodes]
        for hop in range(len(self.relations[0].fanouts)):
            for r, relation in enumerate(self.relations):
                begin, end = frontier[relation.dst]
                self._expand(nodes, edges[r], (r, hop, random_seed), begin, end, until)
            for kind, one in enumerate(nodes):
                frontier[kind] = (frontier[kind][1], len(one.id))
                one.per_hop.append(frontier[kind][1] - frontier[kind][0])
        if self.induced:
            edges = [self._induce(nodes, r) for r in range(len(self.relations))]
        return nodes, edges

    def _begin(
        self, seeds: Sequence[Tensor], seed_time: Sequence[Tensor | None]
    ) -> tuple[list[Nodes], Tensor | None]:
        nodes, num_trees = [], 0
        for ids, count in zip(seeds, self.num_nodes, strict=True):
            wrong = ((ids < 0) | (ids >= count)).nonzero()
            if len(wrong):
                place = int(wrong[0])
                raise IndexError(
                    f"seed {int(ids[place])} at position {place} is not in [0, {count})"
                )
            tree = None
            if self.disjoint:
                tree = torch.arange(num_trees, num_trees + len(ids), device=self.device)
                num_trees += len(ids)
            nodes.append(Nodes(count, ids, tree, [len(ids)]))
        times = [time for time in seed_time if time is not None]
        return nodes, torch.cat(times) if times else None

    def _expand(
        self,
        nodes: list[Nodes],
        edges: Edges,
        step: tuple[int, int, int],
        begin: int,
        end: int,
        until: Tensor | None,
    ) -> None:
        relation = self.relations[step[0]]
        targets = nodes[relation.dst]
        node = targets.id[begin:end]
        tree = None if targets.tree is None else targets.tree[begin:end]
        latest = until[tree] if until is not None and tree is not None else None
        place, owner = self._choose(relation.graph, step, node, tree, latest)
        found = gather(relation.graph.row, place).long()
        src = nodes[relation.src].find_or_insert(found, None if tree is None else tree[owner])
        edges.src.append(src)
        edges.dst.append(owner + begin)
        edges.place.append(place)

    def _choose(
        self,
        graph: CSCGraph,
        step: tuple[int, int, int] | None,
        node: Tensor,
        tree: Tensor | None,
        until: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The places taken, and for each the position in `node` whose column it is in."""
        r, hop, random_seed = step or (0, 0, 0)
        fanouts = self._fanouts[r][hop] if step else self._all
        typed, timed = (graph.edge_type, graph.edge_time) if step else (None, None)
        weight = graph.edge_weight if step else None
        frontier = _core.Frontier(
            colptr=graph.colptr.data_ptr(),
            id_nbytes=graph.index_dtype.itemsize,
            node=node.data_ptr(),
            tree=_address(tree),
            until=_address(until if timed is not None else None),
            size=len(node),
            etype=_address(typed),
            weight=_address(weight),
            time=_address(timed),
            fanouts=fanouts.data_ptr(),
            num_fanouts=len(fanouts),
            replace=self.replace and step is not None,
            last=self.last and timed is not None,
            random_seed=random_seed % 2**64,
            hop=hop,
            relation=r,
        )
        counts = torch.empty(len(node), dtype=torch.int64, device=self.device)
        _run(frontier.count, frontier.count_cuda, counts)
        ends = counts.cumsum(0)
        num_edges = int(ends[-1]) if len(node) else 0
        places = torch.empty(num_edges, dtype=torch.int64, device=self.device)
        _run(frontier.choose, frontier.choose_cuda, ends, places)
        position = torch.arange(len(node), device=self.device)
        return places, position.repeat_interleave(counts, output_size=num_edges)

    def _induce(self, nodes: list[Nodes], r: int) -> Edges:
        """Every edge between the nodes sampled, as one hop."""
        relation = self.relations[r]
        targets, sources = nodes[relation.dst], nodes[relation.src]
        place, owner = self._choose(relation.graph, None, targets.id, None, None)
        found = gather(relation.graph.row, place).long()
        tree = None if targets.tree is None else targets.tree[owner]
        keys = sources.key(found, tree)
        known, order = sources.key(sources.id, sources.tree).sort(stable=True)
        at = torch.searchsorted(known, keys).clamp_(max=max(len(known) - 1, 0))
        inside = known[at] == keys if len(known) else torch.zeros_like(keys, dtype=torch.bool)
        return Edges([order[at[inside]]], [owner[inside]], [place[inside]])


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def _run(on_host: Callable[..., None], on_cuda: Callable[..., None], *arrays: Tensor) -> None:
    addresses = [array.data_ptr() for array in arrays]
    device = arrays[0].device
    if device.type == "cpu":
        on_host(*addresses)
    else:
        with current_device(device):
            on_cuda(*addresses, device.index, torch.cuda.current_stream(device).cuda_stream)
