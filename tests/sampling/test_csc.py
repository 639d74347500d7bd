"""CSCGraph: grouping edges by target, and what it refuses."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataeff.sampling import CSCGraph


@st.composite
def edge_lists(draw, max_nodes=12, max_edges=60):
    num_src = draw(st.integers(1, max_nodes))
    num_dst = draw(st.integers(1, max_nodes))
    edges = draw(
        st.lists(
            st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1)),
            max_size=max_edges,
        )
    )
    return num_src, num_dst, torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t()


def columns(graph):
    e_id = torch.arange(graph.num_edges) if graph.e_id is None else graph.e_id
    ends = graph.colptr.tolist()
    return [
        list(zip(graph.row[a:b].tolist(), e_id[a:b].tolist(), strict=True))
        for a, b in itertools.pairwise(ends)
    ]


@given(
    edge_lists(),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([None, torch.int32, torch.int64]),
)
def test_columns_hold_each_target_s_edges_in_order(edges, dtype, index_dtype):
    num_src, num_dst, edge_index = edges
    graph = CSCGraph(
        edge_index.to(dtype), num_nodes=(num_src, num_dst), index_dtype=index_dtype
    )  # edge_index is a transposed, non-contiguous view
    assert graph.index_dtype == (index_dtype or torch.int32)
    expected = [[] for _ in range(num_dst)]
    for e, (src, dst) in enumerate(edge_index.t().tolist()):
        expected[dst].append((src, e))
    assert columns(graph) == expected
    assert graph.num_nodes == max(num_src, num_dst)


@given(edge_lists(), st.data())
def test_types_times_and_weights_follow_their_edges(edges, data):
    num_src, num_dst, edge_index = edges
    num_edges = edge_index.shape[1]
    values = st.lists(st.integers(0, 3), min_size=num_edges, max_size=num_edges)
    edge_type = torch.tensor(data.draw(values), dtype=torch.int64)
    time = torch.tensor(data.draw(values), dtype=torch.int32)
    sizes = {"num_nodes": (num_src, num_dst)}

    typed = CSCGraph(edge_index, edge_type, num_relations=4, edge_weight=edge_type / 2, **sizes)
    assert typed.sorted_in_columns(typed.edge_type)
    places = typed.e_id if typed.e_id is not None else torch.arange(num_edges)
    assert torch.equal(typed.edge_type.long(), edge_type[places])
    assert torch.equal(typed.edge_weight, edge_type[places].double() / 2)
    assert torch.equal(typed.row.long(), edge_index[0][places])

    timed = CSCGraph(edge_index, edge_time=time, **sizes)
    assert timed.sorted_in_columns(timed.edge_time)
    places = timed.e_id if timed.e_id is not None else torch.arange(num_edges)
    assert torch.equal(timed.edge_time, time[places].long())


def test_sorted_input_keeps_no_permutation():
    assert CSCGraph(torch.tensor([[2, 0, 1], [0, 0, 2]])).e_id is None
    assert CSCGraph(torch.tensor([[2, 0, 1], [0, 2, 0]])).e_id.tolist() == [0, 2, 1]


def test_from_csc_borrows_its_arrays():
    colptr, row = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 2, 0])
    graph = CSCGraph.from_csc(colptr, row)
    assert graph.colptr.data_ptr() == colptr.data_ptr()
    assert graph.row.data_ptr() == row.data_ptr()
    assert (graph.num_src_nodes, graph.num_dst_nodes, graph.num_edges) == (3, 3, 3)
    assert "num_edges=3" in repr(graph)


def test_an_empty_graph_has_no_columns():
    graph = CSCGraph(torch.empty(2, 0, dtype=torch.int64))
    assert (graph.num_nodes, graph.num_edges) == (0, 0)
    assert graph.colptr.tolist() == [0]


@pytest.mark.parametrize(
    ("edge_index", "options", "error", "said"),
    [
        ([[0, 3], [0, 1]], {"num_nodes": 3}, IndexError, "source node 3 of edge 1"),
        ([[0, 0], [0, -1]], {"num_nodes": 3}, IndexError, "target node -1 of edge 1"),
        ([[0, 2**32], [0, 1]], {"num_nodes": 3}, IndexError, "4294967296"),
        ([[0], [0]], {"num_nodes": -1}, ValueError, "num_nodes=-1 is too small"),
        ([[0], [0]], {"num_nodes": float("nan")}, TypeError, "num_nodes=nan is no integer"),
        ([[0], [0], [0]], {}, ValueError, r"\(3, 1\)"),
        ([0, 1], {}, ValueError, "dimension"),
        ([[0], [0]], {"index_dtype": torch.int16}, TypeError, "int16"),
        ([[0], [0]], {"num_nodes": 2**31, "index_dtype": torch.int32}, ValueError, "int64"),
        ([[0], [0]], {"edge_type": torch.tensor([-1])}, IndexError, "edge type -1"),
        (
            [[0], [0]],
            {"edge_type": torch.tensor([2]), "num_relations": 2},
            IndexError,
            "edge type 2",
        ),
        ([[0], [0]], {"num_relations": 2}, ValueError, "edge_type is not"),
        (
            [[0], [0]],
            {"edge_type": torch.tensor([0]), "num_relations": 2.5},
            TypeError,
            "num_relations=2.5 is no integer",
        ),
        ([[0], [0]], {"edge_type": torch.tensor([0, 1])}, ValueError, r"\[1\]"),
        ([[0], [0]], {"edge_type": torch.tensor([0.5])}, TypeError, "float32"),
        ([[0], [0]], {"edge_weight": torch.tensor([-0.5])}, ValueError, "-0.5"),
        ([[0], [0]], {"edge_weight": torch.tensor([float("nan")])}, ValueError, "nan"),
        ([[0], [0]], {"edge_time": torch.tensor([1.5])}, TypeError, "float32"),
        ([[0], [0]], {"edge_weight": torch.tensor([1j])}, TypeError, "real tensor.*complex64"),
        ([[0], [0]], {"edge_weight": [0.5]}, TypeError, "edge_weight must be a tensor, not list"),
    ],
)
def test_bad_edges_are_refused(edge_index, options, error, said):
    with pytest.raises(error, match=said):
        CSCGraph(torch.tensor(edge_index), **options)


def test_ids_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"float32: use \.long"):
        CSCGraph(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="list"):
        CSCGraph([[0], [0]])
    with pytest.raises(ValueError, match="meta"):
        CSCGraph(torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    with pytest.raises(TypeError, match=r"dense tensor, not torch\.sparse_coo"):
        CSCGraph(torch.eye(2).long().to_sparse())


@pytest.mark.parametrize(
    ("colptr", "row", "options", "error", "said"),
    [
        ([0, 2, 1, 3], [0, 1, 2], {}, ValueError, "falls from 2 to 1 at node 1"),
        ([0, 2, 2], [0, 1, 1], {}, ValueError, "runs from 0 to 2"),
        ([1, 2, 3], [0, 1, 1], {}, ValueError, "runs from 1 to 3"),
        ([], [], {}, ValueError, "at least one"),
        ([0, 1, 2], [0, 2], {}, IndexError, "source node 2 of edge 1"),
        ([0, 1, 2], [0, -1], {}, IndexError, "source node -1"),
        ([0, 1, 2], [0, 1], {"e_id": torch.tensor([1])}, ValueError, "e_id has 1"),
        ([0, 2, 2], [0, 1], {"edge_time": torch.tensor([5, 4])}, ValueError, "ascend"),
    ],
)
def test_bad_columns_are_refused(colptr, row, options, error, said):
    colptr = torch.tensor(colptr, dtype=torch.int64)
    with pytest.raises(error, match=said):
        CSCGraph.from_csc(colptr, torch.tensor(row, dtype=torch.int64), **options)


def test_columns_of_two_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"int32.*int64"):
        CSCGraph.from_csc(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int64))
