"""What samplers of one node set and of several share: their options, and who draws where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from dataeff import _core
from dataeff._flags import checked_bool
from dataeff._integers import checked_int
from dataeff._threads import loop_threads
from dataeff.memory.own_pages import move_to_own_pages
from dataeff.sampling.on_device import DeviceSampler, Relation


class Sampler:
    """Draws for seeds on the host by the core, for others where they are.

    Each kind of sampler says which `_relations` it follows, between node types of which `_sizes`,
    and calls `_begin` when it can.

    Raises:
        TypeError: a flag is no bool, or `seed` no integer.
    """

    def __init__(
        self, *, temporal: bool, replace: bool, disjoint: bool, last: bool, induced: bool, seed: int
    ) -> None:
        self.replace = checked_bool("replace", replace)
        self.disjoint = checked_bool("disjoint", disjoint) or temporal
        self.last = checked_bool("last", last)
        self.induced = checked_bool("induced", induced)
        self.seed = checked_int("seed", seed)

    def _relations(self) -> list[Relation]:
        raise NotImplementedError

    def _sizes(self) -> list[int]:
        raise NotImplementedError

    def _options(self) -> dict[str, bool]:
        return {
            "replace": self.replace,
            "disjoint": self.disjoint,
            "last": self.last,
            "induced": self.induced,
        }

    def _begin(self) -> None:
        relations = self._relations()
        on_host = all(relation.graph.device.type == "cpu" for relation in relations)
        self._core = self._make_core(relations) if on_host else None
        self._by_device: dict[torch.device, DeviceSampler] = {}

    def _make_core(
        self, relations: Sequence[Relation]
    ) -> tuple[list[int], _core.NeighborSampler, list[UntypedStorage]]:
        """The addresses at which graphs are read, the core's sampler, and what is at them."""
        held = [values.untyped_storage() for one in relations for values in one.graph.arrays()]
        addresses = _addresses(relations)  # before the core's: one that is too old is made anew
        core = _core.NeighborSampler(
            id_nbytes=relations[0].graph.index_dtype.itemsize,
            num_nodes=self._sizes(),
            relations=[relation_spec(relation) for relation in relations],
            num_hops=len(relations[0].fanouts),
            **self._options(),
        )
        return addresses, core, held

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def on_device(self, device: torch.device) -> DeviceSampler:
        """The sampler of seeds on `device`; the first call registers graphs in host memory."""
        if device not in self._by_device:
            self._by_device[device] = DeviceSampler(
                self._relations(), self._sizes(), device, **self._options()
            )
        return self._by_device[device]

    def _draw_on_host(
        self,
        seeds: Sequence[Tensor],
        times: Sequence[Tensor | None],
        random_seed: int,
        num_threads: int,
    ) -> _core.Sample:
        relations = self._relations()
        if self._core is None:
            device = relations[0].graph.device
            raise ValueError(f"seeds are on cpu but the graph is on {device}: move the seeds")
        if self._core[0] != _addresses(relations):  # a graph that is sent to a process moves
            self._core = self._make_core(relations)
        _, core, held = self._core  # another thread may send it meanwhile
        drawn = core.sample(
            seeds=[(address(i), address(t), i.numel()) for i, t in zip(seeds, times, strict=True)],
            random_seed=random_seed,
            num_threads=num_threads,
        )
        del held
        return drawn

    def _random_seed(self, seed: int | None) -> int:
        return (self.seed if seed is None else checked_int("seed", seed)) % 2**64

    def _threads(self, num_threads: int | None) -> int:
        if num_threads is None:
            return loop_threads()
        return checked_int("num_threads", num_threads, least=1)


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first byte, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(relations: Sequence[Relation]) -> list[int]:
    return [values.data_ptr() for one in relations for values in one.graph.arrays()]


def relation_spec(relation: Relation) -> _core.RelationSpec:
    """What the core needs to know of a relation, whose graph must outlive the sampler."""
    graph = relation.graph
    if torch.cuda.is_available():  # a sampler of seeds there will register the graph's memory
        for values in graph.arrays():
            move_to_own_pages(values)
    return _core.RelationSpec(
        src_type=relation.src,
        dst_type=relation.dst,
        colptr=address(graph.colptr),
        row=address(graph.row),
        e_id=address(graph.e_id),
        etype=address(graph.edge_type),
        weight=address(graph.edge_weight),
        time=address(graph.edge_time),
        fanouts=relation.fanouts,
    )


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
