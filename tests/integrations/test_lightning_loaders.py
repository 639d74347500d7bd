"""Our loaders and learnable rows in a real Lightning Trainer, and PyG's consumers of batches."""

import pytest
import torch
from torch.nn import functional as F

import dataeff

pytest.importorskip("lightning.pytorch")
pytest.importorskip("torch_geometric")
import lightning.pytorch as lightning
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningLinkData, LightningNodeData
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import GraphSAGE

from dataeff.integrations.pyg import (
    CSCGraphStore,
    NeighborLoader,
    PyGNeighborSampler,
    TableFeatureStore,
)
from dataeff.sampling import CSCGraph

pytestmark = pytest.mark.filterwarnings("default")  # the library's own warnings are its own
NUM_NODES = 120


@pytest.fixture
def data():
    torch.manual_seed(0)
    x = torch.randn(NUM_NODES, 8)
    edges = torch.randint(NUM_NODES, (2, 700))
    return Data(x=x, edge_index=edges, y=(x[:, 0] > 0).long(), num_nodes=NUM_NODES)


class Nodes(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.rows, self.seen = GraphSAGE(8, 8, 2, 2), dataeff.HostEmbedding(120, 8), []
        self.automatic_optimization = False

    def training_step(self, batch, index):
        self.seen.append(batch.input_id)
        found = self.net(batch.x + self.rows(batch.n_id), batch.edge_index)[: batch.batch_size]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(found, batch.y[: batch.batch_size]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        rows = torch.optim.SparseAdam(self.rows.parameters(), lr=0.05)
        return [rows, torch.optim.Adam(self.net.parameters(), lr=0.05)]


def fit(module, data, folder, max_epochs, **options):
    trainer = lightning.Trainer(
        max_epochs=max_epochs, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    loader = NeighborLoader(
        data, [3, 3], batch_size=30, num_workers=2, shuffle=True, generator=generator
    )
    trainer.fit(module, loader, **options)
    return trainer


def test_a_trainer_runs_our_loader_and_resumes_learnable_rows(tmp_path, data):
    plain, from_table, resumed = Nodes(), Nodes(), Nodes()
    for module in (from_table, resumed):
        module.load_state_dict(plain.state_dict())
    fit(plain, data, tmp_path, 2)
    assert torch.cat(plain.seen[:4]).sort().values.tolist() == list(range(NUM_NODES))
    data.x = dataeff.FeatureTable(data.x)
    trainer = fit(from_table, data, tmp_path, 2)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, from_table.state_dict()[name]), name
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = fit(resumed, data, tmp_path, 3, ckpt_path=tmp_path / "two.ckpt")
    assert (again.current_epoch, len(resumed.seen)) == (3, 4)
    state = again.optimizers[0].state[resumed.rows.weight]
    assert state["step"] == 12  # the first eight came with the checkpoint


def test_an_explainer_reads_a_batch(data):
    data.x = dataeff.FeatureTable(data.x)
    batch = next(iter(NeighborLoader(data, [3, 3], batch_size=10)))
    explainer = Explainer(
        GraphSAGE(8, 8, 2, 2),
        algorithm=GNNExplainer(epochs=3),
        explanation_type="model",
        node_mask_type="attributes",
        edge_mask_type="object",
        model_config={
            "mode": "multiclass_classification",
            "task_level": "node",
            "return_type": "raw",
        },
    )
    found = explainer(batch.x, batch.edge_index, index=3)
    assert found.validate()
    assert found.node_mask.shape == batch.x.shape


@pytest.mark.parametrize("links", [False, True])
def test_pyg_s_data_modules_take_our_sampler_and_tables(data, links):
    table = dataeff.FeatureTable(data.x, store="fp16")
    graph = CSCGraph(data.edge_index, num_nodes=NUM_NODES)
    stores = TableFeatureStore({(None, "x"): table}), CSCGraphStore({None: graph})
    sampler, options = PyGNeighborSampler(stores, [3, 3]), {"batch_size": 30, "num_workers": 0}
    if links:
        seeds = {"input_train_edges": (None, data.edge_index), "link_sampler": sampler}
        module = LightningLinkData(stores, **seeds, loader="link_neighbor", **options)
    else:
        seeds = {"input_train_nodes": torch.arange(NUM_NODES), "node_sampler": sampler}
        module = LightningNodeData(stores, **seeds, loader="neighbor", **options)
    batch = next(iter(module.train_dataloader()))
    assert torch.equal(batch.x, data.x[batch.n_id].half().float())
    assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
