"""HeteroNeighborSampler against the reference of dataeff.sampling.reference."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataeff.sampling import CSCGraph, HeteroNeighborSampler, NeighborSampler
from dataeff.sampling import reference as ref

SIZES = {"author": 7, "paper": 11, "venue": 3}
TYPES = [
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "rev_writes", "author"),
    ("venue", "holds", "paper"),
]


def make_graphs(seed, num_edges=40, *, times=(), index_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    graphs = {}
    for src, name, dst in TYPES:
        ends = [torch.randint(SIZES[t], (num_edges,), generator=generator) for t in (src, dst)]
        time = torch.randint(10, (num_edges,), generator=generator)
        graphs[src, name, dst] = CSCGraph(
            torch.stack(ends),
            num_nodes=(SIZES[src], SIZES[dst]),
            edge_time=time if (src, name, dst) in times else None,
            index_dtype=index_dtype,
        )
    return graphs


def assert_equals_reference(sampler, out, seeds, seed, seed_time=None, **options):
    node_types = list(sampler.num_nodes)
    relations = [
        ref.Relation(
            node_types.index(key[0]),
            node_types.index(key[2]),
            graph.colptr.tolist(),
            graph.row.tolist(),
            sampler.fanouts[key],
            times=None if graph.edge_time is None else graph.edge_time.tolist(),
        )
        for key, graph in sampler.graphs.items()
    ]
    expected = ref.sample(
        relations,
        [seeds[t].tolist() if t in seeds else [] for t in node_types],
        seed,
        disjoint=sampler.disjoint,
        seed_times=None
        if seed_time is None
        else [seed_time[t].tolist() if t in seed_time else [] for t in node_types],
        **options,
    )
    for i, node_type in enumerate(node_types):
        assert out.n_id[node_type].tolist() == [node for _, node in expected.nodes[i]]
        assert out.num_sampled_nodes[node_type] == expected.nodes_per_hop[i]
        if sampler.disjoint:
            assert out.batch[node_type].tolist() == [tree for tree, _ in expected.nodes[i]]
    for i, (key, graph) in enumerate(sampler.graphs.items()):
        src, dst, places = zip(*expected.edges[i], strict=True) if expected.edges[i] else ((),) * 3
        assert out.edge_index[key].tolist() == [list(src), list(dst)]
        e_id = torch.arange(graph.num_edges) if graph.e_id is None else graph.e_id
        assert out.e_id[key].tolist() == [int(e_id[place]) for place in places]
        assert out.num_sampled_edges[key] == expected.edges_per_hop[i]


@st.composite
def seed_sets(draw):
    types = draw(st.lists(st.sampled_from(list(SIZES)), unique=True))
    return {
        t: torch.tensor(draw(st.lists(st.integers(0, SIZES[t] - 1), max_size=5)), dtype=torch.int64)
        for t in types
    }


@given(
    seed_sets(),
    st.integers(0, 2**40),
    st.lists(st.integers(-1, 4), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_equals_reference(seeds, seed, fanouts, replace, disjoint):
    sampler = HeteroNeighborSampler(make_graphs(seed), fanouts, replace=replace, disjoint=disjoint)
    out = sampler.sample(seeds, seed=seed)
    assert_equals_reference(sampler, out, seeds, seed, replace=replace)


@given(
    seed_sets(),
    st.integers(0, 2**40),
    st.booleans(),
    st.lists(st.sampled_from(TYPES), min_size=1, unique=True),
)
def test_temporal_equals_reference(seeds, seed, last, timed):
    seed_time = {t: ids % 10 for t, ids in seeds.items()}
    sampler = HeteroNeighborSampler(make_graphs(seed, times=timed), [3, 2], last=last)
    out = sampler.sample(seeds, seed=seed, seed_time=seed_time)
    assert_equals_reference(sampler, out, seeds, seed, seed_time, last=last)


def test_fan_outs_by_edge_type():
    fanouts = {key: [i, 1] for i, key in enumerate(TYPES)}
    sampler = HeteroNeighborSampler(make_graphs(0), fanouts)
    seeds = {"paper": torch.arange(11)}
    out = sampler.sample(seeds, seed=1)
    assert_equals_reference(sampler, out, seeds, 1)
    assert out.num_sampled_edges[TYPES[0]][0] == 0
    again = pickle.loads(pickle.dumps(sampler)).sample(seeds, seed=1)
    assert all(torch.equal(again.e_id[key], out.e_id[key]) for key in TYPES)


def test_a_node_type_without_edges():
    sampler = HeteroNeighborSampler(make_graphs(0), [2, 2], num_nodes={"editor": 4, "venue": 3})
    out = sampler.sample({"editor": torch.tensor([3, 0]), "paper": torch.tensor([1])}, seed=1)
    assert out.n_id["editor"].tolist() == [3, 0]
    assert out.num_sampled_nodes["editor"] == [2, 0, 0]
    alone = HeteroNeighborSampler(make_graphs(0), [2, 2]).sample(
        {"paper": torch.tensor([1])}, seed=1
    )
    assert all(torch.equal(out.e_id[key], alone.e_id[key]) for key in TYPES)
    with pytest.raises(IndexError, match="seed 4 at position 0"):
        sampler.sample({"editor": torch.tensor([4])})
    with pytest.raises(ValueError, match="12 nodes of type 'paper', the graphs 11"):
        HeteroNeighborSampler(make_graphs(0), [2], num_nodes={"paper": 12})


def test_graphs_of_two_widths_are_brought_to_one():
    graphs = make_graphs(0)
    graphs[TYPES[1]] = make_graphs(0, index_dtype=torch.int64)[TYPES[1]]
    seeds = {"paper": torch.arange(5)}
    mixed = HeteroNeighborSampler(graphs, [3, 3]).sample(seeds, seed=2)
    narrow = HeteroNeighborSampler(make_graphs(0), [3, 3]).sample(seeds, seed=2)
    assert all(torch.equal(mixed.e_id[key], narrow.e_id[key]) for key in TYPES)


def test_one_type_is_the_homogeneous_sampler():
    graph = make_graphs(3)[TYPES[1]]
    seeds = torch.tensor([4, 2])
    one = NeighborSampler(graph, [3, 3]).sample(seeds, seed=7)
    typed = HeteroNeighborSampler({TYPES[1]: graph}, [3, 3]).sample({"paper": seeds}, seed=7)
    assert torch.equal(one.n_id, typed.n_id["paper"])
    assert torch.equal(one.edge_index, typed.edge_index[TYPES[1]])


def test_bad_input_is_refused():
    graphs = make_graphs(0)
    sampler = HeteroNeighborSampler(graphs, [2])
    with pytest.raises(KeyError, match="editor"):
        sampler.sample({"editor": torch.tensor([0])})
    with pytest.raises(IndexError, match="seed 3 at position 0"):
        sampler.sample({"venue": torch.tensor([3])})
    with pytest.raises(TypeError, match=r"seeds\['venue'\].*float32"):
        sampler.sample({"venue": torch.tensor([0.0])})
    with pytest.raises(ValueError, match="seed_time"):
        sampler.sample({"venue": torch.tensor([0])}, seed_time={"venue": torch.tensor([0])})
    with pytest.raises(ValueError, match="at least one"):
        HeteroNeighborSampler({}, [2])
    with pytest.raises(ValueError, match="edge types are"):
        HeteroNeighborSampler(graphs, {TYPES[0]: [2]})
    with pytest.raises(ValueError, match="same number of hops"):
        HeteroNeighborSampler(graphs, {key: [1] * i for i, key in enumerate(TYPES, 1)})
    smaller = CSCGraph(torch.zeros(2, 1, dtype=torch.int64), num_nodes=(3, 10))
    with pytest.raises(ValueError, match="10 nodes of type 'paper'"):
        HeteroNeighborSampler({**graphs, TYPES[3]: smaller}, [2])
    with pytest.raises(ValueError, match="edge_time"):
        HeteroNeighborSampler(graphs, [2], last=True)


@pytest.mark.parametrize("num_sources", [2**31 - 1, 2**31 + 5, 2**40])
@pytest.mark.parametrize("disjoint", [False, True])
def test_ids_past_31_bits(num_sources, disjoint):
    """A graph of many nodes, few of which have edges; memory follows the edges."""
    last = num_sources - 1
    row = torch.tensor([last, last - 1, 5, last - 2, last])
    key = ("user", "rates", "item")
    graph = CSCGraph.from_csc(torch.tensor([0, 2, 4, 5]), row, num_src_nodes=num_sources)
    sizes = {"user": num_sources, "item": 3}
    sampler = HeteroNeighborSampler({key: graph}, [-1], num_nodes=sizes, disjoint=disjoint)
    out = sampler.sample({"item": torch.arange(3)})
    users = [last, last - 1, 5, last - 2]
    assert out.n_id["user"].tolist() == ([*users, last] if disjoint else users)
    assert out.e_id[key].tolist() == [0, 1, 2, 3, 4]
    found = out.n_id["user"][out.edge_index[key][0]]
    assert found.tolist() == row.tolist()


@pytest.mark.parametrize(
    ("graphs", "error", "said"),
    [
        ({("a", "to", "a"): torch.zeros(2, 1)}, TypeError, "is a Tensor: make a CSCGraph"),
        ({"ab": None}, ValueError, "target type.*'ab'"),
        ([1], TypeError, "by edge type"),
    ],
)
def test_graphs_that_are_none_are_refused(graphs, error, said):
    with pytest.raises(error, match=said):
        HeteroNeighborSampler(graphs, [2])


def test_seeds_and_times_without_a_type_are_refused():
    edges = torch.tensor([[0, 1], [1, 2]])
    graph = CSCGraph(edges, num_nodes=3, edge_time=torch.tensor([1, 2]))
    sampler = HeteroNeighborSampler({("a", "to", "a"): graph}, [2])
    ids = torch.tensor([1, 2])
    with pytest.raises(TypeError, match="seeds of several types go by type, got Tensor"):
        sampler.sample(ids, seed_time={"a": ids})
    with pytest.raises(TypeError, match="seed_time of several types go by type, got Tensor"):
        sampler.sample({"a": ids}, seed_time=ids)
    with pytest.raises(TypeError, match="seed_time must be a tensor, not list"):
        sampler.sample({"a": ids}, seed_time={"a": [1, 2]})
