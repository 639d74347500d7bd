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


def same_as_host(cuda_kernels, options):
    host, device = _core.Frontier(**options), Frontier(**options)
    size = options["size"]
    error = ctypes.create_string_buffer(256)

    def results(count, choose):
        counts = torch.full((size,), -7)
        count(counts.data_ptr())
        ends = counts.cumsum(0)
        places = torch.full((int(ends[-1]) + 2 if size else 2,), -7)
        choose(ends.data_ptr(), places.data_ptr())
        return counts, places

    def on_device(function, *arrays):
        used = function(ctypes.byref(device), *map(ctypes.c_void_p, arrays), 1, error)
        assert not error.value and (used == 1 or not size)

    expected = results(host.count, host.choose)
    found = results(
        lambda *arrays: on_device(cuda_kernels.run_count, *arrays),
        lambda *arrays: on_device(cuda_kernels.run_choose, *arrays),
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert (found[1][-2:] == -7).all()
    return found[1][:-2]


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
    same_as_host(cuda_kernels, options)


@st.composite
def weighted_columns(draw):
    """Lengths of columns, and a weight for each of their entries."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 5, 31, 33, 100, 600, 1500]), max_size=5))
    # The least of weights makes every key infinite: ties. The largest make sums infinite.
    odd = [0.0, 1.0, 5e-324, 1e308, float("nan")]
    palette = draw(st.lists(st.sampled_from(odd), min_size=1, max_size=3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    num_edges = sum(lengths)
    weight = torch.rand(num_edges, dtype=torch.float64)
    which = torch.randint(len(palette), (num_edges,))
    is_odd = torch.rand(num_edges) < draw(st.sampled_from([0.0, 0.1, 1.0]))
    return lengths, torch.where(is_odd, torch.tensor(palette, dtype=torch.float64)[which], weight)


@settings(max_examples=100, deadline=None)
@given(
    columns=weighted_columns(),
    fanouts=st.sampled_from([-1, 0, 1, 7, 32, 33, 100, 1600]).map(lambda one: [one])
    | st.lists(st.sampled_from([-1, 0, 2, 40]), min_size=3, max_size=3),
    timed=st.booleans(),
    replace=st.booleans(),
    shift=st.integers(0, 15),
    seed=st.integers(0, 2**64 - 1),
)
def test_weights(cuda_kernels, columns, fanouts, timed, replace, shift, seed):
    lengths, weight = columns
    if not replace:  # where they are as good as none
        weight[::7] = -weight[::7]
    shifted = torch.empty(shift + len(weight), dtype=torch.float64)[shift:].copy_(weight)
    colptr = torch.tensor([0, *lengths]).cumsum(0)
    timed = timed and len(fanouts) == 1
    ascending = [torch.randint(9, (n,)).sort().values for n in lengths]
    values = torch.cat([*ascending, torch.empty(0, dtype=torch.int64)])
    etype, time = (values % 3).int(), values if timed else None
    if len(fanouts) > 1:
        etype = torch.cat([part.int() // 3 for part in ascending] or [etype])
    node = torch.arange(len(lengths)).repeat(2)
    until = torch.randint(10, (len(node),)) if timed else None
    fanouts = torch.tensor(fanouts)
    same_as_host(
        cuda_kernels,
        {
            **{"colptr": address(colptr), "id_nbytes": 8, "node": address(node), "tree": 0},
            **{"until": address(until), "size": len(node), "etype": address(etype)},
            **{"weight": address(shifted), "time": address(time), "fanouts": address(fanouts)},
            **{"num_fanouts": len(fanouts), "replace": replace, "last": False},
            **{"random_seed": seed, "hop": 0, "relation": 1},
        },
    )


@pytest.mark.parametrize("fanout", [5, 40])
def test_the_first_of_equal_keys(cuda_kernels, fanout):
    weight = torch.full((600,), 5e-324, dtype=torch.float64)  # every key is infinite
    weight[590:593] = 1.0
    colptr, node = torch.tensor([0, 600]), torch.tensor([0])
    fanouts = torch.tensor([fanout])
    places = same_as_host(
        cuda_kernels,
        {
            **{"colptr": address(colptr), "id_nbytes": 8, "node": address(node), "tree": 0},
            **{"until": 0, "size": 1, "etype": 0, "weight": address(weight), "time": 0},
            **{"fanouts": address(fanouts), "num_fanouts": 1, "replace": False, "last": False},
            **{"random_seed": 3, "hop": 0, "relation": 0},
        },
    )
    assert places.tolist() == [*range(fanout - 3), 590, 591, 592]


@pytest.mark.parametrize("fanout", [-1, 32, 33, 1000, 2999])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_many_of_a_hub(cuda_kernels, fanout, replace, last):
    colptr = torch.tensor([0, 3, 3003, 3003, 3103], dtype=torch.int32)
    node, fanouts = torch.tensor([1, 0, 3, 2, 1, 3]), torch.tensor([fanout])
    same_as_host(
        cuda_kernels,
        {
            **{"colptr": address(colptr), "id_nbytes": 4, "node": address(node), "tree": 0},
            **{"until": 0, "size": len(node), "etype": 0, "weight": 0, "time": 0},
            **{"fanouts": address(fanouts), "num_fanouts": 1, "replace": replace and not last},
            **{"last": last, "random_seed": fanout % 7, "hop": 2, "relation": 0},
        },
    )


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
