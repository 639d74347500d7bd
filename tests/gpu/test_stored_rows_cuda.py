"""Small, hot and reordered rows on CUDA, against the same on the CPU."""

import pytest
import torch

import dataeff
from dataeff import HotRows, _core
from dataeff.features.quantised import ELEMENTS, STORED_DTYPES

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _core.cuda_built), reason="needs a CUDA GPU and CUDA build"
)
STORES = list(STORED_DTYPES)
ROWS = 4000


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("width", [1, 7, 16, 100, 128, 129, 160, 353, 602, 1100])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_small_rows_are_those_of_the_cpu(store, dtype, width, index_dtype):
    x = torch.randn(ROWS, width)
    index = torch.randint(-ROWS, ROWS, (3001,), dtype=index_dtype)
    with dataeff.FeatureTable(x, store=store) as table:
        rows = table.gather(index.cuda(), dtype=dtype)
        assert torch.equal(rows.cpu(), table.gather(index, dtype=dtype))


@pytest.mark.parametrize("store", [None, *STORES])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("width", [1, 32, 101, 256])
@pytest.mark.parametrize("sort", [True, False])
def test_hot_rows_hits_and_bytes(store, scored, width, sort):
    x, num_hot = torch.randn(ROWS, width), 300
    score = torch.rand(ROWS) if scored else None
    chosen = score.topk(num_hot).indices if scored else torch.arange(num_hot)
    index = torch.randint(-ROWS, ROWS, (70, 41))
    table = dataeff.FeatureTable(x, store=store, hot=HotRows(num_hot, score), sort=sort)
    expected = dataeff.FeatureTable(x, store=store)[index]
    with table:
        assert torch.equal(table[index.cuda()].cpu(), expected)
        stats = table.stats()
        hits = int(torch.isin(index % ROWS, chosen).sum())
        row_nbytes = width * (STORED_DTYPES[store].itemsize if store else 4)
        row_nbytes += 4 if store in ("int8", "fp8") else 0
        assert stats.num_hot_rows == hits
        assert stats.nbytes == {
            "host->device": (index.numel() - hits) * row_nbytes,
            "device->device": hits * row_nbytes,
        }


@pytest.mark.parametrize("store", [None, "int8"])
def test_adaptive_rows_follow_and_stay_right(store):
    x = torch.randn(ROWS, 64)
    plain = dataeff.FeatureTable(x, store=store)
    hot = HotRows(256, policy="adaptive", every=1)
    with dataeff.FeatureTable(x, store=store, hot=hot) as table:
        popular = torch.randperm(ROWS)[:200]
        for step in range(60):
            index = popular[torch.randint(200, (1000,))]
            rows = table.prefetch(index.cuda()).wait() if step % 2 else table[index.cuda()]
            assert torch.equal(rows.cpu(), plain[index])
        before = table.stats().num_hot_rows
        table[popular.cuda()]
        assert table.stats().num_hot_rows - before > 180


def test_wrong_indices_are_reported_and_their_rows_are_zero():
    x = torch.rand(10, 65) + 1
    for options in ({"store": "int8"}, {"hot": HotRows(3, torch.rand(10))}):
        with dataeff.FeatureTable(x, **options) as table:
            rows = table[torch.tensor([1, 10, -11, 2], device="cuda")]
            assert (rows[1:3] == 0).all() and (rows[[0, 3]] != 0).all()
            with pytest.raises(IndexError, match="2 wrong indices"):
                table.check()


@pytest.mark.parametrize("store", [None, "fp8"])
def test_scatter_reaches_the_hot_copies_and_the_scales(store):
    x = torch.zeros(50, 20)
    with dataeff.FeatureTable(x, store=store, hot=HotRows(10)) as table:
        index = torch.tensor([2, 30, -41, 2], device="cuda")
        assert (table[index] == 0).all()
        rows = torch.randn(4, 20, device="cuda")
        table.scatter_(index, rows)
        torch.testing.assert_close(table[index], rows[[3, 1, 2, 3]], rtol=0.07, atol=0.05)
        assert torch.equal(table[index].cpu(), table[index.cpu()])


def test_unique_and_captured_graphs():
    x = torch.randn(100, 64)
    with dataeff.FeatureTable(x, store="int8", hot=HotRows(10)) as table:
        index = torch.randint(20, (500,), device="cuda")
        assert torch.equal(table.gather(index, unique=True).cpu(), table[index.cpu()])
        index = torch.arange(10, device="cuda")
        table[index]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows = table[index]
        index.add_(50)
        graph.replay()
        assert torch.equal(rows.cpu(), table[torch.arange(50, 60)])


def test_compiles_as_one_graph():
    x = torch.randn(100, 64)
    with dataeff.FeatureTable(x, store="int8", hot=HotRows(10, torch.rand(100))) as table:
        table.register()
        step = torch.compile(lambda index: table[index] * 2, fullgraph=True)
        index = torch.randint(100, (30,), device="cuda")
        torch.testing.assert_close(step(index).cpu(), table[index.cpu()] * 2)
