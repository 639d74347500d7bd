"""dataeff.integrations.pyg.LinkNeighborLoader: neighbourhoods of edges, with negative samples."""

import pytest
import torch
from torch_geometric.data import Data, HeteroData
from torch_geometric.sampler import NegativeSampling

import dataeff
from dataeff.integrations.pyg import LinkNeighborLoader

NUM_NODES, NUM_EDGES = 100, 600
CITES = ("paper", "cites", "paper")
WRITES = ("author", "writes", "paper")


def make_data():
    generator = torch.Generator().manual_seed(0)
    return Data(
        x=torch.randn(NUM_NODES, 3, generator=generator),
        edge_index=torch.randint(NUM_NODES, (2, NUM_EDGES), generator=generator),
    )


def make_hetero():
    generator = torch.Generator().manual_seed(0)
    data = HeteroData()
    data["paper"].x = torch.randn(50, 3, generator=generator)
    data["author"].x = torch.randn(20, 3, generator=generator)
    data[CITES].edge_index = torch.randint(50, (2, 200), generator=generator)
    data[WRITES].edge_index = torch.stack(
        [torch.randint(n, (100,), generator=generator) for n in (20, 50)]
    )
    return data


def test_batches_hold_both_ends():
    data = make_data()
    data.x = dataeff.FeatureTable(x := data.x)
    label = torch.arange(NUM_EDGES)
    loader = LinkNeighborLoader(data, [3, 2], edge_label=label, batch_size=50, num_workers=2)
    for i, batch in enumerate(loader):
        own = torch.arange(50 * i, 50 * (i + 1))
        assert torch.equal(batch.input_id, own)
        assert torch.equal(batch.edge_label, own)
        assert torch.equal(batch.n_id[batch.edge_label_index], data.edge_index[:, own])
        assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
        assert torch.equal(batch.x, x[batch.n_id])


@pytest.mark.parametrize("disjoint", [False, True])
def test_binary_negatives(disjoint):
    data = make_data()
    loader = LinkNeighborLoader(
        data, [3], neg_sampling="binary", batch_size=60, disjoint=disjoint, shuffle=True
    )
    for batch in loader:
        assert batch.edge_label.tolist() == [1.0] * 60 + [0.0] * 60
        ends = batch.n_id[batch.edge_label_index]
        assert torch.equal(ends[:, :60], data.edge_index[:, batch.input_id])
        if disjoint:
            src, dst = batch.edge_label_index
            assert torch.equal(batch.batch[src], batch.batch[dst])


def test_triplets():
    data = make_data()
    negatives = NegativeSampling("triplet", amount=3)
    loader = LinkNeighborLoader(data, [3], neg_sampling=negatives, batch_size=60)
    for batch in loader:
        ends = data.edge_index[:, batch.input_id]
        assert torch.equal(batch.n_id[batch.src_index], ends[0])
        assert torch.equal(batch.n_id[batch.dst_pos_index], ends[1])
        assert batch.dst_neg_index.shape == (60, 3)
        assert batch.dst_neg_index.max() < batch.num_nodes


@pytest.mark.parametrize("weighted", [False, True])
def test_negatives_do_not_depend_on_threads(weighted):
    data = make_data()
    weight = (torch.arange(NUM_NODES) < 10).float() if weighted else None
    negatives = NegativeSampling("binary", 1, src_weight=weight, dst_weight=weight)
    runs = []
    for num_workers in (0, 3):
        torch.manual_seed(1)
        loader = LinkNeighborLoader(
            data, [3], neg_sampling=negatives, batch_size=20, num_workers=num_workers
        )
        runs.append(list(loader))
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left.n_id, right.n_id)
        assert torch.equal(left.edge_label_index, right.edge_label_index)
        if weighted:
            assert (left.n_id[left.edge_label_index[:, 20:]] < 10).all()
    assert not torch.equal(
        runs[0][0].n_id[runs[0][0].edge_label_index], runs[0][1].n_id[runs[0][1].edge_label_index]
    )


def test_negative_weights_of_another_length_are_refused():
    negatives = NegativeSampling("binary", 1, src_weight=torch.ones(7), dst_weight=torch.ones(7))
    loader = LinkNeighborLoader(make_data(), [3], neg_sampling=negatives, batch_size=20)
    with pytest.raises(ValueError, match=r"7.*100"):
        next(iter(loader))


@pytest.mark.parametrize("edge_type", [CITES, WRITES])
@pytest.mark.parametrize("disjoint", [False, True])
def test_hetero_links(edge_type, disjoint):
    data = make_hetero()
    loader = LinkNeighborLoader(
        data,
        [2, 2],
        edge_label_index=edge_type,
        neg_sampling="binary",
        batch_size=25,
        disjoint=disjoint,
    )
    for batch in loader:
        src, dst = batch[edge_type].edge_label_index[:, :25]
        ends = data[edge_type].edge_index[:, batch[edge_type].input_id]
        assert torch.equal(batch[edge_type[0]].n_id[src], ends[0])
        assert torch.equal(batch[edge_type[2]].n_id[dst], ends[1])
        for node_type in data.node_types:
            n_id = batch[node_type].n_id
            assert torch.equal(batch[node_type].x, data[node_type].x[n_id])


def test_times_bound_both_neighbourhoods():
    data = make_data()
    data.time = torch.arange(NUM_EDGES)
    until = torch.randint(NUM_EDGES, (NUM_EDGES,))
    loader = LinkNeighborLoader(
        data, [4, 4], edge_label_time=until, time_attr="time", batch_size=30, num_workers=1
    )
    for batch in loader:
        bound = until[batch.input_id][batch.batch[batch.edge_index[1]]]
        assert (batch.time <= bound).all()
    with pytest.raises(ValueError, match="edge_label_time"):
        LinkNeighborLoader(data, [4], time_attr="time")


@pytest.mark.parametrize(
    "named",
    [None, make_hetero()[CITES].edge_index, ("paper", "likes", "paper"), (WRITES[1:], None), []],
)
def test_edges_of_a_typed_graph_name_their_type(named):
    with pytest.raises(ValueError, match=r"an edge type of the graph, one of \[\('paper', 'cites'"):
        LinkNeighborLoader(make_hetero(), [2], edge_label_index=named)


@pytest.mark.parametrize("named", [WRITES, ("author", "paper"), (list(WRITES), None)])
def test_edge_types_go_by_pyg_s_short_forms(named):
    loader = LinkNeighborLoader(make_hetero(), [2], edge_label_index=named, batch_size=10)
    assert len(loader) == 10 and "input_id" in next(iter(loader))[WRITES]


@pytest.mark.parametrize("num_values", [NUM_EDGES - 1, NUM_EDGES + 1])
def test_there_is_one_label_and_one_time_for_each_edge(num_values):
    values = torch.zeros(num_values, dtype=torch.int64)
    said = f"has {num_values} values for {NUM_EDGES} edges"
    with pytest.raises(ValueError, match=f"edge_label {said}"):
        LinkNeighborLoader(make_data(), [2], edge_label=values)
    data = make_data()
    data.time = torch.zeros(NUM_NODES, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"edge_label_time {said}"):
        LinkNeighborLoader(data, [2], edge_label_time=values, time_attr="time")


@pytest.mark.parametrize(
    ("edges", "error", "said"),
    [
        (torch.zeros(20, 2, dtype=torch.int64), ValueError, r"\[2, num_edges\].*\[20, 2\]"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"\[2, num_edges\].*\[2\]"),
        (torch.zeros(2, 3), TypeError, "torch.float32"),
        ("edges", TypeError, "names one"),
    ],
)
def test_ends_of_another_shape_or_dtype_are_refused(edges, error, said):
    with pytest.raises(error, match=said):
        LinkNeighborLoader(make_data(), [2], edges)


def test_ends_may_be_in_lists_and_arrays():
    ends = [[3, 4], [5, 6]]
    for edges in (ends, torch.tensor(ends).numpy()):
        (batch,) = LinkNeighborLoader(make_data(), [2], edges, batch_size=2)
        assert batch.n_id[batch.edge_label_index].tolist() == ends


def test_labels_are_tensors():
    with pytest.raises(TypeError, match=r"torch.as_tensor\(edge_label\)"):
        LinkNeighborLoader(make_data(), [2], edge_label=[1] * 5, neg_sampling="binary")


def test_there_is_one_input_id_for_each_edge():
    ends = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_id has 4 values for 3"):
        LinkNeighborLoader(make_data(), [2], ends, input_id=torch.arange(4))
