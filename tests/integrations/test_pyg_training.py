"""GraphSAGE learns as much from rows on disk and from small rows as from a plain tensor."""

import pytest
import torch
from torch.nn import functional as F

import dataeff

pytest.importorskip("torch_geometric")
from torch_geometric.data import Data
from torch_geometric.nn import GraphSAGE

from dataeff.integrations.pyg import NeighborLoader

NUM_NODES, NUM_CLASSES = 1500, 4


def learned(x, edge_index, y, seed):
    """Share of the other half of the nodes that a model of this seed gets right."""
    torch.manual_seed(seed)
    model = GraphSAGE(16, 32, 2, NUM_CLASSES)
    data = Data(x=x, edge_index=edge_index, y=y, num_nodes=NUM_NODES)
    options = {"num_neighbors": [6, 6], "batch_size": 250}
    train = NeighborLoader(data, input_nodes=torch.arange(NUM_NODES // 2), shuffle=True, **options)
    test = NeighborLoader(data, input_nodes=torch.arange(NUM_NODES // 2, NUM_NODES), **options)
    for _ in range(4):
        for batch in train:
            loss = F.cross_entropy(
                model(batch.x, batch.edge_index)[: batch.batch_size], batch.y[: batch.batch_size]
            )
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(model.parameters(), gradients, strict=True):
                    weight -= 0.5 * gradient
    with torch.no_grad():
        hits = [
            (model(batch.x, batch.edge_index).argmax(1) == batch.y)[: batch.batch_size]
            for batch in test
        ]
    return torch.cat(hits).float().mean().item()


@pytest.fixture
def one_thread():
    """Batches this small are waited for longer than worked on by more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_as_accurate_from_disk_and_from_small_rows(tmp_path, one_thread):
    torch.manual_seed(0)
    y = torch.randint(NUM_CLASSES, (NUM_NODES,))
    x = torch.randn(NUM_NODES, 16) + 1.2 * F.one_hot(y, 16)
    source = torch.randint(NUM_NODES, (12 * NUM_NODES,))
    target = torch.randint(NUM_NODES, (12 * NUM_NODES,))
    alike = y[source] == y[target]
    edge_index = torch.stack([source, target])[:, alike]  # neighbours share a class
    path = dataeff.convert(x, tmp_path / "x.npy")
    plain = [learned(x, edge_index, y, seed) for seed in range(2)]
    assert min(plain) > 0.7
    with dataeff.FeatureTable.open(path) as table:
        assert learned(table, edge_index, y, 0) == plain[0]  # the very same rows
    noise = max(plain) - min(plain)
    small = learned(dataeff.FeatureTable(x, store="int8"), edge_index, y, 0)
    assert abs(small - plain[0]) <= noise + 0.02, (small, plain)
