"""The sampler of devices, run on the CPU, draws what the host's sampler draws."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dataeff.sampling import CSCGraph, HeteroNeighborSampler, NeighborSampler

CPU = torch.device("cpu")
SETTINGS = settings(deadline=None, max_examples=60)


def same(left, right) -> None:
    for name, mine in dataclasses.asdict(left).items():
        other = dataclasses.asdict(right)[name]
        if isinstance(mine, dict):
            assert mine.keys() == other.keys()
            pairs = [(mine[key], other[key]) for key in mine]
        else:
            pairs = [(mine, other)]
        for one, two in pairs:
            if isinstance(one, Tensor):
                assert one.dtype == two.dtype
                assert torch.equal(one, two), name
            else:
                assert one == two, name


def make_graph(draw, num_nodes: int, wide: bool, kind: str) -> CSCGraph:
    num_edges = draw(st.integers(0, 150))
    torch.manual_seed(draw(st.integers(0, 1000)))
    edge_index = torch.randint(num_nodes, (2, num_edges))
    return CSCGraph(
        edge_index,
        torch.randint(3, (num_edges,)) if kind == "typed" else None,
        num_nodes=num_nodes,
        num_relations=3 if kind == "typed" else None,
        edge_weight=torch.rand(num_edges) * torch.randint(2, (num_edges,))
        if kind == "weighted"
        else None,
        edge_time=torch.randint(20, (num_edges,)) if kind == "timed" else None,
        index_dtype=torch.int64 if wide else None,
    )


@SETTINGS
@given(
    data=st.data(),
    kind=st.sampled_from(["plain", "typed", "weighted", "timed"]),
    num_nodes=st.integers(1, 30),
    fanouts=st.lists(st.integers(-1, 40), min_size=1, max_size=3),
    wide=st.booleans(),
    replace=st.booleans(),
    option=st.sampled_from(["", "disjoint", "last", "induced"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_one_node_set(data, kind, num_nodes, fanouts, wide, replace, option, seed):
    graph = make_graph(data.draw, num_nodes, wide, kind)
    if kind == "typed" and data.draw(st.booleans()):
        fanouts = [[fanout, 0, -1] for fanout in fanouts]
    options = {option: True} if option else {}
    if option == "last" and (kind != "timed" or replace):
        options = {}
    if option == "induced" and kind == "timed":
        options = {}
    try:
        sampler = NeighborSampler(graph, fanouts, replace=replace, **options)
    except ValueError:
        return  # a combination that neither draws
    seeds = torch.tensor(data.draw(st.lists(st.integers(0, num_nodes - 1), max_size=8))).long()
    time = torch.randint(25, (len(seeds),)) if kind == "timed" else None
    host = sampler.sample(seeds, seed=seed, seed_time=time)
    same(host, sampler._sample_on_device(seeds, time, seed))


@SETTINGS
@given(
    data=st.data(),
    fanouts=st.lists(st.integers(-1, 6), min_size=1, max_size=3),
    disjoint=st.booleans(),
    timed=st.sets(st.integers(0, 2)),
    last=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_several_node_types(data, fanouts, disjoint, timed, last, seed):
    sizes = {"a": 12, "b": 7}
    graphs = {}
    for i, (src, dst) in enumerate((("a", "b"), ("b", "a"), ("a", "a"))):
        num_edges = data.draw(st.integers(0, 60))
        torch.manual_seed(num_edges)
        ends = torch.stack(
            [torch.randint(sizes[src], (num_edges,)), torch.randint(sizes[dst], (num_edges,))]
        )
        time = torch.randint(9, (num_edges,)) if i in timed else None
        graphs[src, "to", dst] = CSCGraph(ends, num_nodes=(sizes[src], sizes[dst]), edge_time=time)
    last = last and bool(timed)
    sampler = HeteroNeighborSampler(graphs, fanouts, disjoint=disjoint, last=last)
    seeds = {"a": torch.randint(12, (4,)), "b": torch.randint(7, (3,))}
    times = {kind: torch.randint(10, (len(ids),)) for kind, ids in seeds.items()} if timed else None
    host = sampler.sample(seeds, seed=seed, seed_time=times)
    lists = sampler.on_device(CPU).sample(
        list(seeds.values()), list(times.values()) if times else [None, None], seed
    )
    same(host, sampler._read_lists(*lists))


def test_memory_is_registered_anew_for_a_sample_in_case_torch_has_moved_it():
    sampler = NeighborSampler(CSCGraph(torch.randint(9, (2, 40)), num_nodes=9), [2])
    asked: list[torch.device] = []
    memory: Any = SimpleNamespace(register=asked.append)
    sampler.on_device(CPU)._registered = [memory]
    sampler._sample_on_device(torch.arange(3), None, 0)
    assert asked == [CPU]


def test_a_seed_that_is_no_node_is_named():
    sampler = NeighborSampler(CSCGraph(torch.tensor([[0], [1]]), num_nodes=3), [2])
    with pytest.raises(IndexError, match="seed 3 at position 1"):
        sampler._sample_on_device(torch.tensor([0, 3]), None, 0)


def test_a_graph_on_the_host_stays_itself():
    graph = CSCGraph(torch.tensor([[0], [1]]))
    assert graph.to("cpu") is graph
    assert graph.device == CPU


def test_seeds_on_the_host_cannot_sample_a_graph_elsewhere():
    graph = CSCGraph(torch.tensor([[0], [1]])).to("meta")
    with pytest.raises(ValueError, match="the graph is on meta"):
        NeighborSampler(graph, [1]).sample(torch.tensor([0]))


def test_seeds_of_several_devices_are_refused():
    graph = {("a", "to", "a"): CSCGraph(torch.tensor([[0], [1]]))}
    graph["b", "to", "a"] = CSCGraph(torch.tensor([[0], [1]]), num_nodes=(2, 2))
    sampler = HeteroNeighborSampler(graph, [1])
    with pytest.raises(ValueError, match="bring them to one device"):
        sampler.sample({"a": torch.tensor([0]), "b": torch.tensor([0], device="meta")})
