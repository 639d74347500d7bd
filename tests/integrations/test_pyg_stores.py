"""TableFeatureStore and CSCGraphStore: PyG's store interface over tables and CSC graphs."""

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import LinkLoader, NodeLoader
from torch_geometric.nn import SAGEConv, to_hetero

import dataeff
from dataeff.integrations.pyg import (
    CSCGraphStore,
    LinkNeighborLoader,
    NeighborLoader,
    PyGNeighborSampler,
    TableFeatureStore,
)
from dataeff.sampling import CSCGraph

CITES = ("paper", "cites", "paper")
WRITES = ("author", "writes", "paper")


def make_hetero():
    generator = torch.Generator().manual_seed(0)
    data = HeteroData()
    data["paper"].x = torch.randn(50, 3, generator=generator)
    data["author"].x = torch.randn(20, 4, generator=generator)
    data[CITES].edge_index = torch.randint(50, (2, 200), generator=generator)
    data[WRITES].edge_index = torch.stack(
        [torch.randint(n, (100,), generator=generator) for n in (20, 50)]
    )
    return data


def as_stores(data):
    tables = {(t, "x"): dataeff.FeatureTable(data[t].x) for t in data.node_types}
    graphs = {
        key: CSCGraph(
            data[key].edge_index, num_nodes=(data[key[0]].num_nodes, data[key[2]].num_nodes)
        )
        for key in data.edge_types
    }
    return TableFeatureStore(tables), CSCGraphStore(graphs)


def test_the_loader_samples_stores_as_it_samples_the_data():
    data = make_hetero()
    data[WRITES].edge_attr = torch.arange(100)
    stores = as_stores(data)
    stores[0].put_tensor(data[WRITES].edge_attr, WRITES, "edge_attr", None)
    runs = []
    for source in (data, stores):
        torch.manual_seed(0)
        runs.append(
            list(NeighborLoader(source, [3, 2], input_nodes="paper", batch_size=9, num_workers=2))
        )
    for left, right in zip(*runs, strict=True):
        for node_type in data.node_types:
            assert torch.equal(left[node_type].n_id, right[node_type].n_id)
            assert torch.equal(left[node_type].x, right[node_type].x)
        for key in data.edge_types:
            assert torch.equal(left[key].edge_index, right[key].edge_index)
            assert torch.equal(left[key].e_id, right[key].e_id)
        assert torch.equal(left[WRITES].edge_attr, right[WRITES].edge_attr)


@pytest.mark.parametrize("table", [False, True])
def test_features_are_read_written_and_removed(table):
    x = torch.arange(12.0).view(6, 2)
    store = TableFeatureStore({("paper", "x"): dataeff.FeatureTable(x) if table else x})
    assert store.get_tensor_size(group_name="paper", attr_name="x") == (6, 2)
    assert torch.equal(store.get_tensor("paper", "x", torch.tensor([4, 0])), x[[4, 0]])
    assert torch.equal(store.get_tensor("paper", "x", 2), x[2])  # as PyG's Data does
    assert torch.equal(store.get_tensor("paper", "x", x[:, 0] > 4), x[3:])
    assert torch.equal(store.get_tensor("paper", "x", slice(1, 3)), x[1:3])
    assert torch.equal(store.get_tensor("paper", "x", None), x)
    assert store.put_tensor(torch.ones(1, 2), "paper", "x", torch.tensor([5]))
    assert x[5].tolist() == [1.0, 1.0]
    assert store.update_tensor(torch.zeros(2), "paper", "x", 5)
    assert x[5].tolist() == [0.0, 0.0] and x[4].tolist() == [8.0, 9.0]
    assert not store.put_tensor(torch.ones(1, 2), "paper", "z", torch.tensor([5]))
    assert store.put_tensor(np.zeros((6, 1)), "paper", "z", None)
    assert [attr.attr_name for attr in store.get_all_tensor_attrs()] == ["x", "z"]
    assert store.remove_tensor("paper", "x", None)
    assert store.get_tensor("paper", "x", None) is None
    assert not store.remove_tensor("paper", "x", None)


def test_edges_are_read_written_and_removed():
    store = CSCGraphStore()
    row, col = torch.tensor([3, 0, 1]), torch.tensor([1, 0, 1])
    store.put_edge_index((row, col), WRITES, "coo", size=(4, 2))
    targets = sorted(zip(*(v.tolist() for v in store.get_edge_index(WRITES, "coo")), strict=True))
    assert targets == [(0, 0), (1, 1), (3, 1)]
    rows, colptrs, e_ids = store.csc()
    assert colptrs[WRITES].tolist() == [0, 1, 3]
    assert rows[WRITES].tolist() == [0, 3, 1]
    assert e_ids[WRITES].tolist() == [1, 0, 2]
    assert store.get_all_edge_attrs()[0].size == (4, 2)
    store.put_edge_index((rows[WRITES], colptrs[WRITES]), CITES, "csc", size=(4, 2))
    assert torch.equal(store.get_edge_index(CITES, "csc")[1], colptrs[WRITES])
    with pytest.raises(ValueError, match="csc"):
        store.put_edge_index((row, col), CITES, "csr")
    assert store.remove_edge_index(CITES, "csc")
    with pytest.raises(KeyError):
        store.get_edge_index(CITES, "csc")


def test_stores_that_disagree_are_refused():
    features, graphs = as_stores(make_hetero())
    graphs.put_edge_index((torch.tensor([0]), torch.tensor([0, 1])), CITES, "csc", size=(50, 1))
    with pytest.raises(ValueError, match="1 columns for 50"):
        NeighborLoader((features, graphs), [2], input_nodes="paper")
    with pytest.raises(ValueError, match="'time' is an attribute of neither"):
        NeighborLoader((features, graphs), [2], input_nodes="paper", time_attr="time")
    with pytest.raises(ValueError, match="a node type of the graph, one of"):
        NeighborLoader((features, graphs), [2])
    with pytest.raises(ValueError, match="an edge type of the graph"):
        LinkNeighborLoader((features, graphs), [2])
    with pytest.raises(ValueError, match=r"no edges of type \('a', 'b', 'c'\)"):
        graphs.coo([("a", "b", "c")])
    with pytest.raises(ValueError, match="weight_attr"):
        NeighborLoader((features, graphs), [2], input_nodes="paper", weight_attr="w")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TableFeatureStore({"x": torch.zeros(2, 1)}), "by \\(group, attribute\\).*got 'x'"),
        (lambda: TableFeatureStore({("a", "x"): [1.0]}), "'x'\\) is a list: a FeatureTable or a"),
        (lambda: CSCGraphStore({None: torch.zeros(2, 3)}), "are a Tensor: CSCGraph\\(edge_index"),
    ],
)
def test_stores_of_what_is_no_table_and_no_graph_are_refused(make, said):
    with pytest.raises(TypeError, match=said):
        make()


@pytest.mark.parametrize("Loader", [NeighborLoader, LinkNeighborLoader])
@pytest.mark.parametrize("kind", ["NoneType", "list", "tuple of CSCGraphStore, TableFeatureStore"])
def test_data_of_another_kind_is_refused(Loader, kind):
    swapped = (CSCGraphStore(), TableFeatureStore())
    data = {"NoneType": None, "list": [Data()]}.get(kind, swapped)
    with pytest.raises(TypeError, match=rf"not a {kind}; a data set's graph is dataset\[0\]"):
        Loader(data, [2])


def test_layouts_tell_edges_by_their_ids():
    data = make_hetero()
    store = as_stores(data)[1]
    row, col, ids = (parts[WRITES] for parts in store.coo([WRITES]))
    assert torch.equal(torch.stack([row, col]), data[WRITES].edge_index) and ids is None
    assert all(map(torch.equal, store.get_edge_index(WRITES, "coo"), (row, col)))
    rowptr, col, ids = (parts[WRITES] for parts in store.csr())
    assert all(map(torch.equal, store.get_edge_index(WRITES, "csr"), (rowptr, col)))
    assert len(rowptr) == 21 and rowptr[-1] == 100
    row = torch.arange(20).repeat_interleave(rowptr.diff())
    assert torch.equal(torch.stack([row, col]), data[WRITES].edge_index[:, ids])


def test_pyg_s_own_samplers_get_int64_and_ours_what_is_kept():
    """torch-sparse refuses int32, and pyg-lib gives back edges of int32, which no layer takes."""
    data = make_hetero()
    stores = as_stores(data)
    for arrays in (stores[1].csc(), stores[1].csr()):
        assert {values.dtype for parts in arrays for values in parts.values()} == {torch.int64}
    for layout in ("coo", "csc"):
        arrays = stores[1].get_edge_index(WRITES, layout)
        assert [values.dtype for values in arrays] == [torch.int64] * 2
    kept = stores[1].kept()
    graphs = PyGNeighborSampler(stores, [2]).sampler.graphs
    for key in data.edge_types:
        arrays = (graphs[key].row, graphs[key].colptr, graphs[key].e_id)
        for values, own in zip(arrays, kept, strict=True):
            assert values.dtype == torch.int32 and values.data_ptr() == own[key].data_ptr()


def test_labels_of_links_belong_to_the_edges_of_the_store():
    data = make_hetero()
    loader = LinkNeighborLoader(
        as_stores(data), [2], edge_label_index=WRITES, edge_label=torch.arange(100), batch_size=30
    )
    for batch in loader:
        links = batch[WRITES]
        ends = [
            batch[kind].n_id[links.edge_label_index[i]] for i, kind in ((0, "author"), (1, "paper"))
        ]
        assert torch.equal(torch.stack(ends), data[WRITES].edge_index[:, links.edge_label])


def test_stores_without_types_are_sampled_as_the_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    data = Data(x=x, edge_index=torch.randint(40, (2, 300), generator=generator))
    data.time = torch.randint(9, (40,), generator=generator)
    data.edge_attr = torch.arange(300.0)
    features, graphs = TableFeatureStore(), CSCGraphStore()
    features.put_tensor(data.edge_attr, group_name=None, attr_name="edge_attr", index=None)
    features.put_tensor(dataeff.FeatureTable(x), group_name=None, attr_name="x", index=None)
    features.put_tensor(data.time, group_name=None, attr_name="time", index=None)
    graphs.put_edge_index(tuple(data.edge_index), edge_type=None, layout="coo", size=(40, 40))
    for options in ({}, {"time_attr": "time"}):
        runs = []
        for source in (data, (features, graphs)):
            torch.manual_seed(0)
            runs.append(list(NeighborLoader(source, [3, 2], batch_size=16, **options)))
        for left, right in zip(*runs, strict=True):
            for key in ("x", "n_id", "e_id", "edge_index", "time", "edge_attr"):
                assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("by", ["node", "edge"])
def test_times_in_stores_bound_what_is_sampled(by):
    data = make_hetero()
    features, graphs = as_stores(data)
    generator = torch.Generator().manual_seed(1)
    for key in data.node_types if by == "node" else data.edge_types:
        data[key].when = torch.randint(
            9, (data[key].num_nodes if by == "node" else data[key].num_edges,), generator=generator
        )
        features.put_tensor(data[key].when, group_name=key, attr_name="when", index=None)
    options = {"time_attr": "when", "batch_size": 10, "input_time": torch.arange(50) % 9}
    runs = []
    for source in (data, (features, graphs)):
        torch.manual_seed(0)
        runs.append(list(NeighborLoader(source, [3, 2], input_nodes="paper", **options)))
    for left, right in zip(*runs, strict=True):
        for key in data.edge_types:
            assert torch.equal(left[key].e_id, right[key].e_id)
            assert torch.equal(left[key].edge_index, right[key].edge_index)


class SAGE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = SAGEConv((-1, -1), 8), SAGEConv((-1, -1), 2)

    def forward(self, x, edge_index):
        return self.second(self.first(x, edge_index).relu(), edge_index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pyg_s_own_loaders_and_to_hetero_run_over_tables(num_workers):
    data = make_hetero()
    data["paper", "by", "author"].edge_index = data[WRITES].edge_index.flip(0)
    model = to_hetero(SAGE(), data.metadata())
    results = []
    for source in (data, as_stores(data)):
        sampler = PyGNeighborSampler(source, [-1, -1])
        options = {"batch_size": 25, "num_workers": num_workers}
        nodes = list(NodeLoader(source, sampler, input_nodes="paper", **options))
        links = list(LinkLoader(source, sampler, edge_label_index=WRITES, **options))
        assert len(nodes) == 2 and len(links) == 4
        torch.manual_seed(0)
        with torch.no_grad():
            results.append([model(b.x_dict, b.edge_index_dict)["paper"] for b in nodes + links])
    for left, right in zip(*results, strict=True):
        assert torch.equal(left, right)
