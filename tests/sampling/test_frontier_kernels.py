"""The sampler's CUDA kernels, run on the host, choose what the host's own loops choose."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff import _core
from dataeff.sampling import CSCGraph

FIELDS = [
    *[(name, ctypes.c_void_p) for name in ("colptr",)],
    ("id_nbytes", ctypes.c_int64),
    *[(name, ctypes.c_void_p) for name in ("node", "tree", "until")],
    ("size", ctypes.c_int64),
    *[(name, ctypes.c_void_p) for name in ("etype", "weight", "time", "fanouts")],
    *[(name, ctypes.c_int64) for name in ("num_fanouts", "replace", "last")],
    ("random_seed", ctypes.c_uint64),
    *[(name, ctypes.c_int64) for name in ("hop", "relation")],
]


class Frontier(ctypes.Structure):
    _fields_ = FIELDS


def address(values):
    return 0 if values is None else values.data_ptr()


@settings(max_examples=60, deadline=None)
@given(
    num_nodes=st.integers(1, 40),
    num_frontier=st.sampled_from([0, 1, 31, 33, 256, 700]),
    fanout=st.integers(-1, 12),
    kind=st.sampled_from(["plain", "typed", "weighted", "timed"]),
    wide=st.booleans(),
    replace=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_counts_and_places(
    cuda_kernels, num_nodes, num_frontier, fanout, kind, wide, replace, seed
):
    torch.manual_seed(seed % 1000)
    num_edges = 20 * num_nodes
    graph = CSCGraph(
        torch.randint(num_nodes, (2, num_edges)),
        torch.randint(3, (num_edges,)) if kind == "typed" else None,
        num_nodes=num_nodes,
        num_relations=3 if kind == "typed" else None,
        edge_weight=torch.rand(num_edges).round(decimals=1) if kind == "weighted" else None,
        edge_time=torch.randint(20, (num_edges,)) if kind == "timed" else None,
        index_dtype=torch.int64 if wide else None,
    )
    node = torch.randint(num_nodes, (num_frontier,))
    until = torch.randint(25, (num_frontier,)) if kind == "timed" else None
    tree = torch.randint(5, (num_frontier,)) if seed % 2 else None
    fanouts = torch.tensor([fanout, 2, 0] if kind == "typed" else [fanout])
    options = {
        **{"colptr": address(graph.colptr), "id_nbytes": graph.index_dtype.itemsize},
        **{"node": address(node), "tree": address(tree), "until": address(until)},
        **{"size": num_frontier, "etype": address(graph.edge_type)},
        **{"weight": address(graph.edge_weight), "time": address(graph.edge_time)},
        **{"fanouts": address(fanouts), "num_fanouts": len(fanouts)},
        **{"replace": replace, "last": kind == "timed" and bool(seed % 3) and not replace},
        **{"random_seed": seed, "hop": 1, "relation": 2},
    }
    host, device = _core.Frontier(**options), Frontier(**options)
    error = ctypes.create_string_buffer(256)

    def results(count, choose):
        counts = torch.full((num_frontier,), -7)
        count(counts.data_ptr())
        ends = counts.cumsum(0)
        offsets = ends - counts
        places = torch.full((int(ends[-1]) + 2 if num_frontier else 2,), -7)
        choose(offsets.data_ptr(), places.data_ptr())
        return counts, places

    def on_device(function, *arrays):
        used = function(ctypes.byref(device), *map(ctypes.c_void_p, arrays), 1, error)
        assert not error.value and (used == 1 or not num_frontier)

    expected = results(host.count, host.choose)
    found = results(
        lambda *arrays: on_device(cuda_kernels.run_count, *arrays),
        lambda *arrays: on_device(cuda_kernels.run_choose, *arrays),
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (found[1][-2:] == -7).all()


@pytest.mark.parametrize("num_nodes", [256 * 512 + 1000])
def test_a_frontier_of_more_nodes_than_threads(cuda_kernels, num_nodes):
    colptr, node = torch.arange(2 * num_nodes + 1)[::2].contiguous(), torch.arange(num_nodes)
    fanouts, counts = torch.tensor([-1]), torch.zeros(num_nodes, dtype=torch.int64)
    frontier = Frontier(
        **{"colptr": address(colptr), "id_nbytes": 8, "node": address(node), "size": num_nodes},
        **{"fanouts": address(fanouts), "num_fanouts": 1},
    )
    error = ctypes.create_string_buffer(256)
    pointer = ctypes.c_void_p(counts.data_ptr())
    cuda_kernels.run_count(ctypes.byref(frontier), pointer, 0, error)
    assert not error.value and (counts == 2).all()
