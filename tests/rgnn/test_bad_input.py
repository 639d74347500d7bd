"""What a user can get wrong, and the message that names it."""

import contextlib
import re

import pytest
import torch
from rgnn_layers import built_as_on_a_gpu, rgat, rgcn

from dataeff import rgnn
from dataeff.nn import RGCNConv
from dataeff.rgnn.gemm import typed_gemm

EDGES, TYPES = torch.tensor([[0, 1, 2], [2, 0, 1]]), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (0, 3, r"source node 3 at edge 1 is out of range: the graph has 3"),
        (0, -1, r"source node -1 at edge 1"),
        (1, 7, r"destination node 7 at edge 1"),
    ],
)
def test_edge_index_out_of_range(ids, row, value, message):
    edges = EDGES.clone()
    edges[row, 1] = value
    with pytest.raises(IndexError, match=message):
        rgnn.Graph(edges.to(ids), TYPES, num_nodes=3)


@pytest.mark.parametrize("value", [2, -1])
def test_relation_out_of_range(value):
    types = torch.tensor([0, value, 1])
    with pytest.raises(IndexError, match=rf"relation {value} at edge 1 .* the graph has 2"):
        rgnn.Graph(EDGES, types, num_nodes=3, num_relations=2)
    with pytest.raises(IndexError, match=rf"relation {value}"):
        RGCNConv(4, 4, num_relations=2)(torch.randn(3, 4), EDGES, types)


BUILDERS = pytest.mark.parametrize(
    "built", [contextlib.nullcontext, built_as_on_a_gpu], ids=["core", "as on a GPU"]
)


@BUILDERS
@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (0, 3, r"source node 3 at edge 1 is out of range: the graph has 3"),
        (0, -1, r"source node -1 at edge 1"),
        (0, 2**32 + 1, r"source node 4294967297 at edge 1"),  # in 32 bits it would be node 1
        (1, 7, r"destination node 7 at edge 1"),
        (1, -(2**63), r"destination node -9223372036854775808 at edge 1"),
        (2, 2, r"relation 2 at edge 1 is out of range: the graph has 2"),
        (2, -(2**32), r"relation -4294967296 at edge 1"),
    ],
)
def test_ids_that_were_not_validated_are_found_before_a_kernel_reads_them(
    built, row, value, message
):
    ids = torch.cat([EDGES, TYPES[None]])
    ids[row, 1] = value
    graph = rgnn.Graph(ids[:2], ids[2], num_nodes=3, num_relations=2, validate=False)
    x, W = torch.randn(3, 4), torch.randn(2, 4, 4)
    with built():
        for _ in range(2):  # nothing half built is kept
            with pytest.raises(IndexError, match=message):
                rgcn(graph, x, W)
        right = rgnn.Graph(EDGES, TYPES, num_nodes=3, num_relations=2, validate=False)
        assert rgcn(right, x, W).isfinite().all()


@BUILDERS
@pytest.mark.parametrize("value", [2, -1, 2**32])
def test_node_types_that_were_not_validated(built, value):
    graph = rgnn.Graph(
        *(EDGES, TYPES),
        num_nodes=3,
        num_relations=2,
        node_type=torch.tensor([0, value, 1]),
        num_node_types=2,
        validate=False,
    )
    with built(), pytest.raises(IndexError, match=rf"node type {value} of node 1 .* there are 2"):
        graph.index("node.ntype")


def test_ids_written_to_after_they_were_validated_are_found_on_a_gpu():
    edges = EDGES.clone()
    graph = rgnn.Graph(edges, TYPES, num_nodes=3)
    edges[0, 2] = 5
    with built_as_on_a_gpu(), pytest.raises(IndexError, match="source node 5 at edge 2"):
        graph.prepare()


def test_building_on_a_gpu_waits_for_it_three_times(monkeypatch):
    """For the two numbers of pairs, and once for every id, which were waited for already."""
    graph = rgnn.Graph(EDGES, TYPES, num_nodes=3, validate=False)
    waits = []
    for name in ("nonzero", "tolist", "item", "__int__", "__bool__"):
        method = getattr(torch.Tensor, name)

        def counted(self, *args, method=method, name=name, **kwargs):
            waits.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    with built_as_on_a_gpu():
        graph.prepare()
    assert waits == ["nonzero", "nonzero", "tolist"]


def test_fewer_weights_than_relations_and_rows_than_nodes(small):
    with pytest.raises(ValueError, match=r"W has shape \[3, 5, 6\].* at least 4 rows"):
        rgcn(small, torch.randn(20, 5), torch.randn(3, 5, 6))
    with pytest.raises(ValueError, match=r"x has shape \[19, 5\].* needs 20 rows"):
        rgcn(small, torch.randn(19, 5), torch.randn(4, 5, 6))


@pytest.mark.parametrize("name", ["num_nodes", "num_relations", "num_node_types"])
@pytest.mark.parametrize("given", [3.0, "3", True], ids=repr)
def test_counts_are_whole_numbers(name, given):
    counts = {"num_nodes": 3, name: given}
    with pytest.raises(TypeError, match=rf"^{name}={given!r} is no integer: int\({name}\)"):
        rgnn.Graph(EDGES, TYPES, node_type=torch.zeros(3, dtype=torch.long), **counts)


def test_a_sparse_adjacency_is_refused():
    with pytest.raises(TypeError, match=r"edge_index must be dense, got torch.sparse_coo"):
        rgnn.Graph(torch.eye(2, dtype=torch.int64).to_sparse(), num_nodes=2)


def test_what_is_no_graph_or_no_tensor_is_named(small):
    with pytest.raises(TypeError, match=r"rgcn takes an rgnn.Graph first, got Tensor"):
        rgcn(small.edge_index, torch.randn(20, 8), torch.randn(4, 8, 6))
    with pytest.raises(TypeError, match="edge_index must be a tensor, got list"):
        rgnn.Graph([[0, 1], [1, 0]], num_nodes=2)
    with pytest.raises(ValueError, match="num_relations=-1 is too small"):
        rgnn.Graph(torch.zeros(2, 0, dtype=torch.long), num_nodes=2, num_relations=-1)


def test_a_wrong_width_is_a_value_error_too(small):
    with pytest.raises(ValueError, match=r"edge\[9\] and weight etype\[8x6\]"):
        rgcn(small, torch.randn(20, 9), torch.randn(4, 8, 6))


def test_rows_of_destinations_where_those_of_sources_are_read():
    graph = rgnn.Graph(EDGES[:, 1:], TYPES[1:], num_src_nodes=3, num_dst_nodes=2)
    layer = rgnn.layer(lambda g, x, y, W: g.sum(g.src(x)) + rgnn.linear(y, W))
    with pytest.raises(ValueError, match=r"y has shape \[2, 4\].* 3 rows; g.at_dst\(y\) and g.dst"):
        layer(graph, torch.randn(3, 4), torch.randn(2, 4), torch.randn(4, 4))


def test_arguments_without_names_are_refused_when_a_layer_is_made():
    with pytest.raises(TypeError, match=r"takes \*weights; each of a layer's arguments has a name"):
        rgnn.layer(lambda g, x, *weights: g.sum(g.src(x)))


def test_a_block_without_ids_and_a_type_without_nodes():
    class Block:
        edge_index = EDGES

    with pytest.raises(TypeError, match="a sampled block has edge_index and n_id, got Block"):
        rgnn.Graph.from_block(Block())
    with pytest.raises(IndexError, match="0 'b' nodes; num_nodes, and num_dst_nodes of a block"):
        rgnn.Graph.from_typed({("a", "to", "b"): EDGES}, {"a": 3, "b": 3}, num_dst_nodes={"a": 3})


def test_wrong_width_names_both_shapes(small):
    a = torch.randn(4, 6)
    with pytest.raises(rgnn.LayerTypeError, match=r"edge\[7\].*etype\[5x6\]"):
        rgat(small, torch.randn(20, 7), torch.randn(4, 5, 6), a, a)


def test_device_mismatch_names_both_devices(small):
    with pytest.raises(ValueError, match=r"argument W is on meta, but the graph on cpu"):
        rgcn(small, torch.randn(20, 5), torch.randn(4, 5, 6, device="meta"))
    with pytest.raises(ValueError, match="edge_type is on meta, edge_index on cpu"):
        rgnn.Graph(EDGES, TYPES.to("meta"), num_nodes=3)


@pytest.mark.parametrize("seg_ptr", [[0, 3, 2, 4], [0, 2, 3], [1, 2, 4]])
def test_segments_that_do_not_ascend_to_the_rows(seg_ptr):
    weight = torch.randn(len(seg_ptr) - 1, 5, 6)
    with pytest.raises(ValueError, match="seg_ptr"):
        typed_gemm(torch.randn(4, 5), weight, torch.tensor(seg_ptr))


def test_a_gathered_row_out_of_range():
    with pytest.raises(IndexError, match="9"):
        typed_gemm(
            torch.randn(4, 5),
            torch.randn(1, 5, 6),
            torch.tensor([0, 2]),
            gather=torch.tensor([0, 9]),
        )


@pytest.mark.parametrize(
    ("function", "types"),
    [
        (lambda g, x, W: g.sum(g.src(x) * W[g.ntype]), (r"ntype\[4\]", r"edge\[8\]")),
        (lambda g, x, W: g.sum(rgnn.concat(g.src(x), g.at_dst(x))), (r"dst\[8\]", r"edge\[8\]")),
        (
            lambda g, x, W: g.per_relation.sum(g.src(x)) * g.src(x),
            (r"edge\[8\]", r"dst_pair\[8\]"),
        ),
    ],
    ids=["node types", "destinations", "pairs"],
)
def test_values_of_other_domains_are_refused_with_both_types(small, function, types):
    with pytest.raises(rgnn.LayerTypeError, match=r"test_bad_input.py:\d+: .*lambda g") as error:
        rgnn.layer(function)(small, torch.randn(20, 8), torch.randn(4, 4))
    for name in types:
        assert re.search(name, str(error.value)), error.value


@pytest.mark.parametrize(
    "function",
    [
        lambda g, x: g.sum(g.dst(x)),
        lambda g, x: g.at_dst(x),
        lambda g, x: g.in_degree() + g.node(x),
    ],
    ids=["dst", "at_dst", "sum"],
)
def test_destinations_that_are_no_sources_have_no_value_of_them(function):
    edges = torch.tensor([[0, 1], [3, 4]])
    graph = rgnn.Graph(edges, torch.zeros(2).long(), num_src_nodes=2, num_dst_nodes=5)
    with pytest.raises(rgnn.LayerTypeError, match=r"node\[8?\].* not among its 2 source nodes"):
        rgnn.layer(function)(graph, torch.randn(2, 8))
