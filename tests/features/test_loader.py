"""The loader gives what the plain loop gives, ahead of time, and ends cleanly wherever it ends."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataeff
from dataeff import FeatureLoader, FeatureTable
from dataeff.sampling import CSCGraph, HeteroNeighborSampler, NeighborSampler


def random_graph(num_nodes=200, num_edges=2000):
    return torch.randint(num_nodes, (2, num_edges))


@pytest.fixture
def x():
    return torch.randn(200, 3)


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 20), max_size=6),
    num_threads=st.integers(0, 3),
    depth=st.integers(1, 4),
)
def test_it_equals_the_plain_loop(sizes, num_threads, depth):
    torch.manual_seed(0)
    graph, features = CSCGraph(random_graph(), num_nodes=200), torch.randn(200, 3)
    sampler = NeighborSampler(graph, [3, 2])
    items = [(torch.randint(200, (size,)), seed) for seed, size in enumerate(sizes)]

    def sample(item):
        return sampler.sample(item[0], seed=item[1])

    with FeatureTable(features) as table:
        loader = FeatureLoader(items, table, sample, num_threads=num_threads, depth=depth)
        got = list(loader)
        again = list(loader)
    assert len(got) == len(again) == len(loader) == len(items)
    for item, (batch, rows), (_, rows_again) in zip(items, got, again, strict=True):
        assert torch.equal(batch.n_id, sample(item).n_id)
        assert torch.equal(rows, features[batch.n_id])
        assert torch.equal(rows, rows_again)


def test_tables_by_node_type():
    edges = {
        ("a", "to", "b"): torch.randint(50, (2, 300)),
        ("b", "to", "a"): torch.randint(50, (2, 300)),
    }
    graphs = {kind: CSCGraph(ids, num_nodes=50) for kind, ids in edges.items()}
    sampler = HeteroNeighborSampler(graphs, {kind: [3] for kind in graphs})
    xs = {"a": torch.randn(50, 2), "b": torch.randn(50, 4), "c": torch.randn(1, 1)}
    tables = {kind: FeatureTable(rows) for kind, rows in xs.items()}
    loader = FeatureLoader([torch.arange(5)], tables, lambda ids: sampler.sample({"a": ids}))
    [(batch, rows)] = loader
    assert rows.keys() == {"a", "b"}
    for kind in rows:
        assert torch.equal(rows[kind], xs[kind][batch.n_id[kind]])


def test_pyg_batches_bring_their_ids(x):
    data = pytest.importorskip("torch_geometric.data")
    plain = data.Data(n_id=torch.tensor([3, 1]))
    hetero = data.HeteroData()
    hetero["a"].n_id, hetero["b"].n_id = torch.tensor([3, 1]), torch.tensor([0])
    table = FeatureTable(x)
    assert torch.equal(next(iter(FeatureLoader([plain], table)))[1], x[[3, 1]])
    [(_, rows)] = FeatureLoader([hetero], {"a": table, "b": table})
    assert torch.equal(rows["a"], x[[3, 1]]) and torch.equal(rows["b"], x[[0]])


def test_sampling_runs_ahead_and_no_further_than_its_depth(x):
    begun, ahead = [], []

    def sample(item):
        begun.append(item)
        return torch.tensor([item])

    loader = FeatureLoader(range(12), FeatureTable(x), sample, depth=3)
    for i, _ in enumerate(loader):
        while len(begun) == i + 1 < 12:  # would never end, were nothing sampled ahead
            time.sleep(0.001)
        time.sleep(0.01)
        ahead.append(len(begun) - i - 1)
    # One batch is in use, one has its rows fetched, up to three are sampled.
    assert 1 <= max(ahead) <= 4


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_comes_where_its_batch_would_have(x, num_threads):
    def sample(item):
        if item == 3:
            raise KeyError("no such seed")
        return torch.tensor([item])

    seen = []
    with pytest.raises(KeyError, match="no such seed"):
        for batch, _ in FeatureLoader(range(9), FeatureTable(x), sample, num_threads=num_threads):
            seen.append(int(batch))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 1}, {"sample": None}])
def test_a_stop_iteration_of_the_caller_s_code_ends_no_epoch_early(x, options):
    ids = [torch.tensor([i]) for i in range(4)]

    def stops(batch):
        return next(iter([]))

    if "sample" in options:
        loader = FeatureLoader(ids, FeatureTable(x), index=stops)
    else:
        loader = FeatureLoader(ids, FeatureTable(x), stops, **options)
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(loader)


@pytest.mark.parametrize("sample", [None, torch.clone])
def test_an_error_of_the_items_comes_where_its_batch_would_have(x, sample):
    def items():
        yield from map(torch.tensor, ([0], [1], [2]))
        raise OSError("the list of seeds cannot be read")

    seen = []
    with pytest.raises(OSError, match="list of seeds"):
        for batch, _ in FeatureLoader(items(), FeatureTable(x), sample, depth=4):
            seen.append(int(batch))
    assert seen == [0, 1, 2]


def test_a_wrong_index_is_raised(x):
    with pytest.raises(IndexError, match="200"):
        list(FeatureLoader([torch.tensor([0]), torch.tensor([200])], FeatureTable(x)))


def test_a_closed_table_is_said(x):
    table = FeatureTable(x)
    loader = iter(FeatureLoader([torch.tensor([0])] * 5, table))
    next(loader)
    table.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(loader)


def test_leaving_early_ends_the_threads(x):
    before = set(threading.enumerate())
    with FeatureTable(x) as table:
        for _ in FeatureLoader(range(1000), table, lambda i: torch.tensor([i % 7]), num_threads=3):
            break
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_wrong_arguments_are_named(x):
    table = FeatureTable(x)
    with pytest.raises(ValueError, match="depth=0"):
        FeatureLoader([], table, depth=0)
    with pytest.raises(TypeError, match="num_threads=nan is no integer"):
        FeatureLoader([], table, num_threads=float("nan"))
    with pytest.raises(TypeError, match="FeatureTable, got a Tensor"):
        FeatureLoader([], {"a": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="num_threads=-1"):
        FeatureLoader([], table, num_threads=-1)
    with pytest.raises(TypeError, match="pass index="):
        list(FeatureLoader([SimpleNamespace()], table))
    with pytest.raises(TypeError, match="by type"):
        list(FeatureLoader([torch.tensor([0])], {"a": table}))
    assert dataeff.FeatureLoader is FeatureLoader
