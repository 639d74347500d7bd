from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rgnn_layers import built_as_on_a_gpu, gated, graphs, rgat
from torch.utils._python_dispatch import TorchDispatchMode

from dataeff import rgnn
from dataeff.rgnn import structure
from dataeff.rgnn.sorting import sort_ids

MAPS = (
    "edge.dst",
    "edge.src",
    "edge.etype",
    "edge.src_pair",
    "edge.dst_pair",
    "src_pair.src",
    "src_pair.etype",
    "dst_pair.dst",
    "dst_pair.etype",
    "edge.given",
)


@given(graphs())
def test_every_map_agrees_with_its_segments(case):
    edge_index, etype, nodes, relations = case
    g = rgnn.Graph(edge_index, etype, num_nodes=nodes, num_relations=relations)
    for name in MAPS:
        index, s = g.index(name).tolist(), g.segments(name)
        seen = []
        for row, (b, e) in enumerate(zip(s.begin.tolist(), s.end.tolist(), strict=True)):
            members = list(range(b, e)) if s.items is None else s.items[b:e].tolist()
            assert all(index[m] == row for m in members)
            assert members == sorted(members) or name == "edge.etype"  # that one is by source
            seen += members
        assert sorted(seen) == list(range(len(index)))


@given(case=graphs(), wide=st.booleans())
def test_a_gpu_builds_the_same_structures(case, wide):
    edge_index, etype, nodes, relations = case
    ids = torch.int64 if wide else torch.int32
    made = [
        rgnn.Graph(edge_index.to(ids), etype, num_nodes=nodes, num_relations=relations)
        for _ in range(2)
    ]
    with built_as_on_a_gpu():
        made[1].prepare()
        for name in MAPS:
            made[1].segments(name)
    for name in MAPS:
        host, device = (g.segments(name) for g in made)
        assert torch.equal(*(g.index(name) for g in made))
        assert torch.equal(host.begin, device.begin) and torch.equal(host.end, device.end)
        assert (host.items is None) == (device.items is None)
        assert host.items is None or torch.equal(host.items, device.items)
    assert made[0].sizes == made[1].sizes


def test_a_gpu_sorts_no_column_twice(small):
    graph, sorts = rgnn.Graph(small.edge_index, small.edge_type, num_nodes=20), []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            sorts.extend([func] * (func.overloadpacket == torch.ops.aten.sort))
            return func(*args, **(kwargs or {}))

    with built_as_on_a_gpu(), Counted():
        graph.prepare()
    assert len(sorts) == 5  # edges by both columns, from either end, and pairs of destinations


@given(graphs())
def test_the_longest_segments_are_known_once_structures_are_built(case):
    """Those of edges for certain; those of pairs by the relations that a node's edges can have."""
    edge_index, etype, nodes, relations = case
    made = [rgnn.Graph(edge_index, etype, num_nodes=nodes, num_relations=relations) for _ in "ab"]
    with built_as_on_a_gpu():
        known = {name: made[1].structure.longest(name) for name in MAPS}
    lengths = {name: made[0].structure.longest(name) for name in MAPS}
    for name in MAPS:
        s = made[0].segments(name)
        assert lengths[name] == max((s.end - s.begin).tolist(), default=0)
    for end in ("src", "dst"):
        assert known[f"edge.{end}"] == lengths[f"edge.{end}"]
        assert known[f"edge.{end}_pair"] == lengths[f"edge.{end}_pair"]
        pairs = f"{end}_pair.{end}"
        assert lengths[pairs] <= known[pairs] <= min(relations, lengths[f"edge.{end}"])
    assert known["edge.given"] == lengths["edge.given"] <= 1
    assert known["edge.etype"] == etype.numel()  # from shapes: no traversal asks for it


@given(graphs())
def test_pairs_are_unique_and_factor_the_edge_maps(case):
    edge_index, etype, nodes, relations = case
    g = rgnn.Graph(edge_index, etype, num_nodes=nodes, num_relations=relations)
    order = g.index("edge.given").long()
    assert torch.equal(g.index("edge.src").long(), edge_index[0][order])
    assert torch.equal(g.index("edge.dst").long(), edge_index[1][order])
    for side, end in (("src", 0), ("dst", 1)):
        pair = g.index(f"edge.{side}_pair").long()
        assert torch.equal(g.index(f"{side}_pair.{side}").long()[pair], edge_index[end][order])
        assert torch.equal(g.index(f"{side}_pair.etype").long()[pair], etype[order])
        expected = len(set(zip(edge_index[end].tolist(), etype.tolist(), strict=True)))
        assert g.num_rows(f"{side}_pair") == expected
        types = g.index(f"{side}_pair.etype").tolist()
        assert types == sorted(types)


def test_ids_are_int32_and_sizes_are_reported(small):
    assert small.index("edge.src").dtype == torch.int32
    assert small.nbytes > 60 * 4
    assert 0 < small.src_pair_ratio <= 1
    assert "num_edges=60" in repr(small)


def test_a_compacted_layer_builds_no_map_that_it_does_not_read(small):
    graph = rgnn.Graph(small.edge_index, small.edge_type, num_nodes=20)
    args = [torch.randn(s, requires_grad=True) for s in ((20, 8), (4, 8, 6), (4, 6), (4, 6))]
    rgat(graph, *args).sum().backward()
    built = graph.nbytes
    order = graph.index("edge.given").long()
    assert graph.nbytes == built + 60 * 4
    assert torch.equal(graph.index("edge.etype").long(), graph.edge_type[order])
    assert graph.nbytes == built + 2 * 60 * 4
    assert torch.equal(graph.index("edge.src").long(), graph.edge_index[0][order])
    assert graph.nbytes == built + 3 * 60 * 4  # beside the numbers of pairs, which the layer reads


def test_sources_of_edges_stand_in_the_place_of_numbers_of_pairs_that_nobody_reads(small):
    graph = rgnn.Graph(small.edge_index, small.edge_type, num_nodes=20).prepare()
    built, order = graph.nbytes, graph.index("edge.given").long()
    sorted_once = graph.nbytes
    assert torch.equal(graph.index("edge.src").long(), graph.edge_index[0][order])
    assert graph.nbytes == sorted_once > built
    again = rgnn.Graph(small.edge_index, small.edge_type, num_nodes=20)
    assert torch.equal(graph.index("edge.src_pair"), again.index("edge.src_pair"))
    assert graph.nbytes == sorted_once + 60 * 4


def test_a_wrong_id_is_named():
    edges = torch.tensor([[0, 1], [1, 7]])
    with pytest.raises(IndexError, match="destination node 7 at edge 1"):
        rgnn.Graph(edges, num_nodes=3)
    with pytest.raises(IndexError, match="source node -1 at edge 0"):
        rgnn.Graph(torch.tensor([[-1], [0]]), num_nodes=3)
    with pytest.raises(IndexError, match="relation 5 at edge 0"):
        rgnn.Graph(torch.tensor([[0], [0]]), torch.tensor([5]), num_nodes=3, num_relations=2)
    with pytest.raises(TypeError, match="int32 or int64"):
        rgnn.Graph(edges.float(), num_nodes=9)
    with pytest.raises(ValueError, match=r"\[2\] like the edges"):
        rgnn.Graph(edges, torch.tensor([0]), num_nodes=9)
    with pytest.raises(ValueError, match="num_nodes"):
        rgnn.Graph(edges)


def test_a_dead_graph_is_reported(small):
    from dataeff.rgnn.graph import graph_of

    assert graph_of(small.token) is small
    with pytest.raises(RuntimeError, match="no longer exists"):
        graph_of(torch.tensor([-1]))


def test_a_graph_is_found_again_whatever_the_default_device_is():
    """Its token is looked at by the host at every call: it is never to be on a GPU."""
    edges = torch.tensor([[0, 1], [1, 0]])
    with torch.device("meta"):
        graph = rgnn.Graph(edges, num_nodes=2)
    assert graph.token.device.type == "cpu"


def test_a_new_graph_is_sorted_once_for_a_layer_of_edge_values():
    ends, kinds = torch.randint(20, (2, 60)), torch.randint(4, (60,))
    x, W, U = torch.randn(20, 5), torch.randn(4, 5, 6), torch.randn(5, 6)
    c, e = torch.randn(4), torch.randn(60)
    made = []

    def sort(*args):
        made.append(args)
        return sort_ids(*args)

    graph = rgnn.Graph(ends, kinds, num_nodes=20)
    with mock.patch.object(structure, "sort_ids", sort):
        y = gated(graph, x, W, U, c, e)
        once = len(made)
        later = rgnn.Graph(ends, kinds, num_nodes=20).prepare()
        assert len(made) == 2 * once
        assert torch.equal(gated(later, x, W, U, c, e), y)  # their order is asked for too late
        assert len(made) > 2 * once
    assert torch.equal(graph.index("edge.given"), later.index("edge.given"))


def test_a_graph_that_is_there_already_is_not_built_again():
    edge_index, etype = torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 1])
    graph = rgnn.Graph(edge_index, etype, num_nodes=2).prepare()
    assert graph.to("cpu") is graph and graph.to(torch.device("cpu")) is graph
    with pytest.raises(ValueError, match="meta device"):
        graph.to("meta")
