"""What is in host memory stays there whatever torch's default device and dtype are.

The meta device stands for a GPU: it has no memory that the host could write to either.
"""

import numpy as np
import pytest
import torch

import dataeff
from dataeff.features import hotness
from dataeff.sampling import CSCGraph, HeteroNeighborSampler, NeighborSampler

CPU = torch.device("cpu")


@pytest.fixture(params=["device", "dtype"])
def default(request):
    """Another default than torch's own, for one test."""
    if request.param == "device":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x():
    return torch.randn(40, 6, dtype=torch.float32, device="cpu")


@pytest.fixture
def index():
    return torch.tensor([3, -1, 3, 0], device="cpu")


@pytest.mark.parametrize(
    "kind", ["plain", "fp16", "int8", "fp8", "first", "scored", "adaptive", "sorted", "disk"]
)
def test_tables(tmp_path, x, index, default, kind):
    score = torch.rand(40, device="cpu")
    options = {
        "plain": {},
        "first": {"hot": dataeff.HotRows(9)},
        "scored": {"hot": dataeff.HotRows(9, score)},
        "adaptive": {"hot": dataeff.HotRows(9, score, policy="adaptive", every=1)},
        "sorted": {"sort": True},
    }
    if kind == "disk":
        table = dataeff.FeatureTable.open(dataeff.convert(x, tmp_path / "x.npy"))
    else:
        table = dataeff.FeatureTable(x, **options.get(kind, {"store": kind}))
    tolerance = {"fp16": 1e-2, "int8": 0.05, "fp8": 0.3}.get(kind, 0)
    with table:
        for selection in (index, 2, slice(1, 30, 3), [1, 5], x[:, 0] > 0, range(3), np.arange(4)):
            rows, right = table[selection], x[selection]
            assert rows.device == CPU and rows.dtype == torch.float32
            assert torch.allclose(rows, right, rtol=0, atol=tolerance)
        assert torch.equal(table.gather(index, unique=True), table[index])
        assert torch.equal(table.prefetch(index).wait(), table[index])
        if kind != "disk":
            table.scatter_(index[:2], x[[7, 8]])
            assert torch.allclose(table[index[:2]], x[[7, 8]], rtol=0, atol=tolerance)
            assert torch.allclose(table[[4, 30]], x[[4, 30]], rtol=0, atol=tolerance)


def test_learnable_rows_and_unified_tensors(x, index, default):
    rows = dataeff.HostEmbedding(40, 6, dtype=torch.float32)
    loss = rows(index).pow(2).sum()
    loss.backward()
    torch.optim.SparseAdam(rows.parameters()).step()
    assert rows.weight.device == rows.weight.grad.device == CPU
    u = dataeff.unified(x)
    assert torch.equal(u[index], x[index]) and torch.equal(u[:0] + 1, x[:0])


def test_samples(default):
    ends = torch.randint(30, (2, 300), device="cpu")
    seeds = torch.tensor([4, 9], device="cpu")
    for typed in (None, torch.randint(3, (300,), device="cpu")):
        graph = CSCGraph(ends, typed, num_nodes=30)
        sample = NeighborSampler(graph, [4, 3]).sample(seeds)
        assert torch.equal(sample.n_id[sample.edge_index], ends[:, sample.e_id])
    graphs = {("a", "to", "a"): graph}
    typed_sample = HeteroNeighborSampler(graphs, [4, 3]).sample({"a": seeds})
    assert typed_sample.n_id["a"].device == CPU
    for score in (
        hotness.degree(ends, 30),
        hotness.reverse_pagerank(ends, 30),
        hotness.weighted_reverse_pagerank(ends, 30, seeds),
        hotness.access_counts([seeds], 30),
    ):
        assert score.device == CPU and score.dtype == torch.float64
