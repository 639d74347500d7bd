"""Seeds on CUDA: the kernels read the graph in place and draw what the host draws."""

from __future__ import annotations

import pytest
import torch

from dataeff.sampling import CSCGraph, NeighborSampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("kind", ["plain", "typed", "weighted", "timed"])
@pytest.mark.parametrize("replace", [False, True])
def test_the_sample_of_a_seed_is_one_on_every_device(on_gpu, kind, replace):
    torch.manual_seed(0)
    edge_index = torch.randint(5000, (2, 100_000))
    graph = CSCGraph(
        edge_index,
        torch.randint(3, (100_000,)) if kind == "typed" else None,
        num_nodes=5000,
        edge_weight=torch.rand(100_000) if kind == "weighted" else None,
        edge_time=torch.randint(100, (100_000,)) if kind == "timed" else None,
    )
    seeds = torch.randperm(5000)[:64]
    time = torch.full((64,), 60) if kind == "timed" else None
    host = NeighborSampler(graph, [10, 40], replace=replace).sample(seeds, seed_time=time)
    there = NeighborSampler(graph.to("cuda") if on_gpu else graph, [10, 40], replace=replace)
    device = there.sample(seeds.cuda(), seed_time=None if time is None else time.cuda())
    assert device.n_id.is_cuda
    assert torch.equal(host.n_id, device.n_id.cpu())
    assert torch.equal(host.edge_index, device.edge_index.cpu())
    assert torch.equal(host.e_id, device.e_id.cpu())
    assert host.num_sampled_nodes == device.num_sampled_nodes


@pytest.mark.parametrize("fanout", [-1, 20, 200])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("replace", [False, True])
def test_a_hub(fanout, weighted, replace):
    torch.manual_seed(0)
    edge_index = torch.randint(3000, (2, 30_000))
    edge_index[1, :20_000] = 7
    weight = torch.rand(30_000) * torch.randint(3, (30_000,)) if weighted else None
    graph = CSCGraph(edge_index, num_nodes=3000, edge_weight=weight)
    sampler = NeighborSampler(graph, [fanout], replace=replace)
    seeds = torch.tensor([3, 7, 100])
    host, device = sampler.sample(seeds), sampler.sample(seeds.cuda())
    assert torch.equal(host.e_id, device.e_id.cpu())
    assert torch.equal(host.edge_index, device.edge_index.cpu())


def test_a_graph_that_another_process_maps_is_read_where_it_is_then():
    graph = CSCGraph(torch.randint(3000, (2, 30_000)), num_nodes=3000)
    sampler, seeds = NeighborSampler(graph, [5, 5]), torch.arange(64, device="cuda")
    before, at = sampler.sample(seeds), graph.row.data_ptr()
    graph.row.set_(graph.row.clone())  # as torch moves what it shares
    assert graph.row.data_ptr() != at
    assert torch.equal(sampler.sample(seeds).n_id, before.n_id)


def test_a_wrong_seed_is_raised_and_the_context_lives():
    sampler = NeighborSampler(CSCGraph(torch.randint(10, (2, 50)), num_nodes=10), [3])
    with pytest.raises(IndexError, match="seed 10"):
        sampler.sample(torch.tensor([0, 10], device="cuda"))
    assert len(sampler.sample(torch.tensor([0], device="cuda")).n_id) >= 1
