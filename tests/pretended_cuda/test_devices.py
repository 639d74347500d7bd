"""Work on a device that is not the current one: launches on its streams, memory of its own.

The pretended runtime refuses a launch on a stream of another device than the current one, and
`synchronize` waits for the current device alone.
"""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dataeff
from dataeff import ActivationOffload, FeatureLoader, FeatureTable, HostEmbedding, HotRows, rgnn
from dataeff.nn.published import PUBLISHED
from dataeff.sampling import CSCGraph, NeighborSampler

SEEDS = (0, *range(1, 1 + int(os.environ.get("PRETENDED_CUDA_SEEDS", "4"))))
THERE = torch.device("cuda", 1)
ROWS, WIDTH = 500, 16
TABLES = {
    "plain": {},
    "int8": {"store": "int8"},
    "static": {"hot": HotRows(50, torch.arange(ROWS))},
    "adaptive": {"hot": HotRows(50, policy="adaptive", every=1)},
}


@pytest.fixture
def x():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def elsewhere():
    """The current device is another all along."""
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


def hold():
    """Lets what is queued there from now on begin late."""
    with torch.cuda.device(THERE):
        torch.cuda._sleep(1)


@pytest.mark.parametrize("kind", [*TABLES, "disk"])
def test_rows_come_to_the_device_of_the_index(late, x, tmp_path, kind):
    np.save(tmp_path / "x.npy", x.clone().numpy())
    for seed in SEEDS:
        late(seed)
        disk = kind == "disk"
        table = FeatureTable.open(tmp_path / "x.npy") if disk else FeatureTable(x, **TABLES[kind])
        with table:
            for step in range(4):
                index = torch.arange(step, ROWS, 3)
                right, there = table[index], index.to(THERE)
                hold()
                pending = table.prefetch(there)
                again = table.prefetch(there, unique=True)
                for rows in (table[there], pending.wait(), again.wait()):
                    assert rows.device == THERE and torch.equal(rows.cpu(), right), (seed, step)
            if disk:
                continue
            hold()
            old = table[there]
            table.scatter_(there[:5], torch.zeros(5, WIDTH, device=THERE))
            assert torch.equal(old.cpu(), right) and not table[there[:5]].any()
            table.scatter_(index[:5], right[:5])
            here = table[index.to("cuda:0")]  # and both at once
            assert here.device.index == 0 and torch.equal(here.cpu(), table[there].cpu())


def test_a_closed_table_is_read_no_more(late, x):
    late(0)
    own, index = x.clone(), torch.arange(ROWS, device=THERE)
    table = FeatureTable(own)
    table[index]
    hold()
    rows = table[index]
    table.close()
    own.zero_()
    assert torch.equal(rows.cpu(), x)


def test_wrong_indices_are_told_apart_by_device(late, x):
    late(SEEDS[-1])
    table = FeatureTable(x).register(0).register(1)
    table[torch.tensor([ROWS], device=THERE)]
    with pytest.raises(IndexError, match="1 wrong indices in earlier gathers on cuda:1"):
        table.check()
    table.close()


def test_a_loader_delivers_there(late, x):
    graph = torch.randint(ROWS, (2, 4000), generator=torch.Generator().manual_seed(1))
    sampler = NeighborSampler(CSCGraph(graph, num_nodes=ROWS), [4, 3])
    for seed in SEEDS:
        late(seed)
        with FeatureTable(x, **TABLES["adaptive"]) as table:
            items = [torch.arange(30) + i for i in range(5)]
            for batch, rows in FeatureLoader(items, table, sampler.sample, device=THERE):
                assert rows.device == THERE and torch.equal(rows.cpu(), x[batch.n_id])
        here, there = sampler.sample(items[0], seed=3), sampler.sample(items[0].to(THERE), seed=3)
        assert there.n_id.device == THERE and torch.equal(there.n_id.cpu(), here.n_id)
        assert torch.equal(there.edge_index.cpu(), here.edge_index)


def test_host_rows_and_unified_tensors(late, x):
    for seed in SEEDS:
        late(seed)
        rows = HostEmbedding(ROWS, WIDTH)
        index = torch.arange(0, ROWS, 7, device=THERE)
        hold()
        found = rows(index)
        assert found.device == THERE and torch.equal(found.cpu(), rows.weight[index.cpu()])
        found.sum().backward()
        assert (rows.weight.grad.coalesce().values() == 1).all()
        u = dataeff.unified(x.clone())
        hold()
        assert torch.equal(F.embedding(index, u).cpu(), x[index.cpu()])
        hold()
        u.add_(torch.ones(WIDTH, device=THERE))
        assert torch.equal(u.cpu(), x + 1)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_activations_of_a_model_there(late, tmp_path, tier):
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48))
        for _ in range(3)
    ]
    model, batch = nn.Sequential(*layers).to(THERE), torch.randn(64, 48).to(THERE)

    def step(offload=None):
        model.zero_grad(set_to_none=True)
        if offload is None:
            model(batch).square().mean().backward()
        else:
            with offload:
                model(batch).square().mean().backward()
        return [p.grad.cpu() for p in model.parameters()]

    expected = step()
    where = {"spill": tmp_path} if tier == "disk" else {"host_bytes": 1 << 20}
    offload = ActivationOffload(model, min_bytes=0, **where)
    for seed in SEEDS:
        late(seed)
        for _ in range(2):
            assert all(map(torch.equal, step(offload), expected)), seed
    assert sum(module.bytes_stored for module in offload.report().modules.values()) > 0
    offload.close()


def test_layers_there(late):
    pytest.importorskip("triton")
    layer = PUBLISHED["rgat"]
    shapes = layer.shapes(12, 1, 2, 16, 1, 16)
    torch.manual_seed(0)
    values = {name: torch.randn(*shape) * 0.3 for name, shape in shapes.items()}
    ids = torch.randint(12, (2, 40))

    def step(device):
        edges = ids.to(device)
        graph = rgnn.Graph(edges, edges[0] % 2, num_nodes=12, num_relations=2)
        args = {name: value.to(device).requires_grad_() for name, value in values.items()}
        y = layer.layer(graph, **args, **layer.statics(1))
        return [y, *torch.autograd.grad(y.square().sum(), list(args.values()))]

    late(SEEDS[-1])
    for found, right in zip(step(THERE), step("cpu"), strict=True):
        assert found.device == THERE
        torch.testing.assert_close(found.cpu(), right, rtol=1e-4, atol=1e-4)
