"""TableFeatureStore and CSCGraphStore: PyG's store interface over tables and CSC graphs."""

import numpy as np
import pytest
import torch
from torch_geometric.data import HeteroData

import dataeff
from dataeff.integrations.pyg import CSCGraphStore, NeighborLoader, TableFeatureStore
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
    runs = []
    for source in (data, as_stores(data)):
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


@pytest.mark.parametrize("table", [False, True])
def test_features_are_read_written_and_removed(table):
    x = torch.arange(12.0).view(6, 2)
    store = TableFeatureStore({("paper", "x"): dataeff.FeatureTable(x) if table else x})
    assert store.get_tensor_size(group_name="paper", attr_name="x") == (6, 2)
    assert torch.equal(store.get_tensor("paper", "x", torch.tensor([4, 0])), x[[4, 0]])
    assert torch.equal(store.get_tensor("paper", "x", 2), x[2:3])
    assert torch.equal(store.get_tensor("paper", "x", slice(1, 3)), x[1:3])
    assert torch.equal(store.get_tensor("paper", "x", None), x)
    assert store.put_tensor(torch.ones(1, 2), "paper", "x", torch.tensor([5]))
    assert x[5].tolist() == [1.0, 1.0]
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
    with pytest.raises(ValueError, match="time_attr"):
        NeighborLoader((features, graphs), [2], input_nodes="paper", time_attr="time")
    with pytest.raises(ValueError, match="weight_attr"):
        NeighborLoader((features, graphs), [2], input_nodes="paper", weight_attr="w")
