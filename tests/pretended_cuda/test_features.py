"""Rows brought to a device whose streams run late: the rows of plain indexing.

A wait that is missing, memory given back too early or a host buffer used again too early shows as
rubbish in the rows, as a wrong index that nobody gave, or as another choice of hot rows.
"""

import contextlib
import copy
import gc
import io
import os
import pickle
import threading
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dataeff
from dataeff import FeatureLoader, FeatureTable, HostEmbedding, HotRows, _core
from dataeff.features.adaptive import AdaptivePlacement
from dataeff.features.gather import gather
from dataeff.features.hot import HotTier
from dataeff.sampling import CSCGraph, NeighborSampler

SEEDS = range(1, 1 + int(os.environ.get("PRETENDED_CUDA_SEEDS", "4")))
ROWS, WIDTH, NUM_HOT = 900, 24, 96
TABLES = {
    "plain": {},
    "int8": {"store": "int8"},
    "sorted": {"sort": True},
    "static": {"hot": HotRows(NUM_HOT, torch.arange(ROWS))},
    "adaptive": {"hot": HotRows(NUM_HOT, policy="adaptive", every=1)},
    "adaptive int8": {"store": "int8", "hot": HotRows(NUM_HOT, policy="adaptive", every=2)},
    "adaptive fp8": {"store": "fp8", "hot": HotRows(NUM_HOT, policy="adaptive", every=1)},
}
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn]


@pytest.fixture
def x():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def make_indices(count, size=400):
    """Host indices whose taste changes, so that hot rows have to move."""
    generator = torch.Generator().manual_seed(1)
    popular = torch.randperm(ROWS, generator=generator)
    draws = torch.randint(150, (count, size), generator=generator)
    return [popular[(draws[i] + 90 * (i // 4)) % ROWS] for i in range(count)]


def hold(stream=None):
    """Lets what is queued on a stream from now on begin late."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1)


def dirty(like, value, count=6):
    """Takes and overwrites memory of that size that the current stream has free."""
    return [torch.full_like(like, value) for _ in range(count)]


# --- gathers on several streams, hot rows moving --------------------------------------------------


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("way", ["gather", "prefetch", "unique ahead"])
def test_gathers_on_several_streams(late, x, kind, way):
    indices = make_indices(16)
    for seed in SEEDS:
        late(seed)
        streams, found = [torch.cuda.Stream() for _ in range(3)], []
        with FeatureTable(x, **TABLES[kind]) as table:
            expected = [table[index] for index in indices]
            for i, index in enumerate(indices):
                with torch.cuda.stream(streams[i % 3]):
                    index = index.to("cuda", non_blocking=True)
                    if way == "gather":
                        rows = table[index]
                    else:
                        rows = table.prefetch(index, unique=way != "prefetch").wait()
                    found.append(rows * 1)
            for stream in streams:
                torch.cuda.current_stream().wait_stream(stream)
            for rows, right in zip(found, expected, strict=True):
                assert torch.equal(rows.cpu(), right), seed


def test_memory_of_the_device_is_read_by_all_of_it(x, monkeypatch):
    """Few blocks fill the bus; the device's own memory takes them all."""
    blocks = []

    def launch(*arguments, **options):
        blocks.append(options["num_blocks"])
        real(*arguments, **options)

    real = _core.gather_cuda
    monkeypatch.setattr(_core, "gather_cuda", launch)
    index = torch.tensor([3, 0, 3], device="cuda")
    table = FeatureTable(x)
    for rows in (table[index], gather(x.cuda(), index)):
        assert torch.equal(rows.cpu(), x[[3, 0, 3]])
    assert blocks == [0, torch.cuda.get_device_properties("cuda").multi_processor_count]
    table.close()


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_blocks_over_the_bus_are_those_that_are_asked_for(x, kind, monkeypatch):
    blocks = []

    def launch(*arguments, **options):
        blocks.append(options["num_blocks"])
        real(*arguments, **options)

    real = _core.gather_cuda
    monkeypatch.setattr(_core, "gather_cuda", launch)
    index = torch.tensor([3, 0, 3], device="cuda")
    with FeatureTable(x, **TABLES[kind]) as table:
        for asked in ("3", "", "65536"):
            monkeypatch.setenv("DATAEFF_GATHER_BLOCKS", asked)
            assert torch.equal(table[index].cpu(), table[index.cpu()])
        assert blocks == [3, 0, 65536]
        for asked in ("0", "-1", "2.5", "many", "65537"):
            monkeypatch.setenv("DATAEFF_GATHER_BLOCKS", asked)
            with pytest.raises(ValueError, match=f"DATAEFF_GATHER_BLOCKS='{asked}' is no number"):
                table[index]


def test_hot_rows_move_as_they_would_without_streams(late, x):
    """Whoever gathers next sees all moves of whoever gathered before, and nobody half of one."""
    indices = make_indices(20)
    alone = AdaptivePlacement(ROWS, torch.arange(NUM_HOT), torch.device("cpu"))
    for index in indices:
        alone.commit(alone.propose(index))
    for seed in SEEDS:
        late(seed)
        streams = [torch.cuda.Stream() for _ in range(3)]
        with FeatureTable(x, **TABLES["adaptive"]) as table:
            for i, index in enumerate(indices):
                with torch.cuda.stream(streams[i % 3]):
                    table[index.to("cuda")]
            torch.cuda.synchronize()
            (tier,) = table._rows._tiers.values()
            placed = tier.placement
            for name in ("slots", "held", "counts", "num_moved"):
                assert torch.equal(getattr(placed, name).cpu(), getattr(alone, name)), (seed, name)
            assert torch.equal(tier.rows.cpu(), x[alone.held])
            assert tier.num_moved() > 20


def test_a_move_waits_for_the_gathers_before_it_and_they_for_it(late, x):
    late(0)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    indices = [index.cuda() for index in make_indices(8)]
    with FeatureTable(x, **TABLES["adaptive"]) as table:
        table.register()
        torch.cuda.synchronize()
        found = []
        for index in indices:
            for stream in (first, second):
                hold(first)
                with torch.cuda.stream(stream):
                    found.append((index, table[index]))
        torch.cuda.synchronize()
        for index, rows in found:
            assert torch.equal(rows.cpu(), x[index.cpu()])


def test_hot_rows_are_there_when_another_stream_gathers_first(late, x, monkeypatch):
    """They are brought in on the stream that is current at the first gather, here a late one."""
    late(0)
    begin = HotTier.__init__

    def begin_late(self, *arguments):
        hold()
        begin(self, *arguments)

    monkeypatch.setattr(HotTier, "__init__", begin_late)
    index = torch.arange(ROWS).cuda()
    side = torch.cuda.Stream()
    for kind in ("static", "adaptive", "adaptive int8"):
        with FeatureTable(x, **TABLES[kind]) as table:
            right = table[index.cpu()]
            table.register()
            with torch.cuda.stream(side):
                rows = table[index]
                assert torch.equal(rows.cpu(), right)


def test_rows_written_reach_every_stream_and_no_gather_under_way(late, x):
    side = torch.cuda.Stream()
    index, before = torch.arange(ROWS).cuda(), x.clone()
    for seed in SEEDS:
        late(seed)
        for kind in ("plain", "static", "adaptive"):
            x.copy_(before)
            with FeatureTable(x, **TABLES[kind]) as table:
                table[index]
                torch.cuda.synchronize()
                hold(side)
                with torch.cuda.stream(side):
                    old = table[index]
                written = torch.arange(0, ROWS, 3)
                rows = torch.full((len(written), WIDTH), 5.0)
                table.scatter_(written.cuda(), rows.cuda())
                with torch.cuda.stream(side):
                    new = table[index]
                    assert torch.equal(old.cpu(), before) and torch.equal(new.cpu(), x)
                assert (x[written] == 5).all()


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.parametrize("kind", ["static", "adaptive"])
def test_hot_rows_of_dtypes_that_torch_does_little_with(late, kind, dtype):
    """They move, and what is written reaches them."""
    late(SEEDS[-1])
    bits = torch.randint(100, (ROWS, WIDTH * dtype.itemsize), dtype=torch.uint8)
    with FeatureTable(bits.view(dtype), **TABLES[kind]) as table:
        for index in make_indices(12):
            assert torch.equal(table[index.cuda()].cpu().view(torch.uint8), bits[index])
        written = torch.arange(ROWS - 1, -1, -3)
        rows = torch.full((len(written), WIDTH * dtype.itemsize), 101, dtype=torch.uint8)
        table.scatter_(written.cuda(), rows.cuda().view(dtype))
        everything = torch.arange(ROWS).cuda()
        assert torch.equal(table[everything].cpu().view(torch.uint8), bits)
        assert (bits[written] == 101).all()


class Refuses(TorchDispatchMode):
    """Of new tensors on the device all but the first `granted`."""

    def __init__(self, granted):
        super().__init__()
        self.granted = granted

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        made = isinstance(found, torch.Tensor) and found.is_cuda
        if made and not (function.is_view or function._schema.is_mutable):
            self.granted -= 1
            if self.granted < 0:
                raise torch.OutOfMemoryError("refused")
        return found


@pytest.mark.parametrize("kind", ["int8", "static", "adaptive", "adaptive fp8"])
def test_a_write_that_the_device_has_no_memory_for_writes_nothing(late, x, kind):
    late(0)
    everything = torch.arange(ROWS).cuda()
    written = torch.arange(-ROWS, ROWS, 5)
    with FeatureTable(x, **TABLES[kind]) as table:
        before, refused = table[everything].cpu(), 0
        while True:
            try:
                with Refuses(refused):
                    table.scatter_(written, torch.full((len(written), WIDTH), 2.0))
                break
            except torch.OutOfMemoryError:
                refused += 1
            assert torch.equal(table[everything.cpu()], before)
            assert torch.equal(table[everything].cpu(), before)
        assert refused > 1
        assert torch.equal(table[everything].cpu(), table[everything.cpu()])
        assert (table[written] == 2).all()


# --- prefetches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "adaptive"])
@pytest.mark.parametrize("unique", [False, True])
def test_a_prefetch_waits_for_its_index(late, x, kind, unique):
    for seed in (0, *SEEDS):
        late(seed)
        with FeatureTable(x, **TABLES[kind]) as table:
            table.register()
            source = torch.arange(ROWS).cuda()
            torch.cuda.synchronize()
            hold()
            pending = table.prefetch(source.flip(0), unique=unique)
            assert torch.equal(pending.wait().cpu(), x.flip(0))
            table.check()


def test_whoever_waits_sees_all_rows(late, x):
    late(0)
    with FeatureTable(x) as table:
        index = torch.arange(ROWS).cuda()
        table.prefetch(index).wait()
        torch.cuda.synchronize()
        for reader in (torch.cuda.current_stream(), torch.cuda.Stream()):
            hold(table._prefetcher._stream(index))
            pending = table.prefetch(index)
            with torch.cuda.stream(reader):
                seen = pending.wait() * 1
                assert pending.wait() is pending.wait()
                assert torch.equal(seen.cpu(), x)


@pytest.mark.parametrize("unique", [False, True])
def test_rows_let_go_on_another_stream_stay_until_they_are_read(late, x, unique):
    """Their memory goes back to the stream that asked, which knows nothing of the reader."""
    late(0)
    reader = torch.cuda.Stream()
    with FeatureTable(x) as table:
        index = torch.arange(ROWS).cuda()
        for _ in range(3):
            pending = table.prefetch(index, unique=unique)
            hold(reader)
            with torch.cuda.stream(reader):
                rows = pending.wait()
                seen = rows * 1
            del pending
            like = torch.empty_like(rows, device="meta")
            del rows
            dirty(torch.empty(like.shape, device="cuda"), float("nan"))
            with torch.cuda.stream(reader):
                assert torch.equal(seen.cpu(), x)


@pytest.mark.parametrize("waits", ["here", "elsewhere", "never"])
def test_an_index_let_go_is_read_before_its_memory_is_used_again(late, x, waits):
    late(0)
    reader = torch.cuda.current_stream() if waits == "here" else torch.cuda.Stream()
    with FeatureTable(x) as table:
        table.register()
        for _ in range(3):
            index = torch.arange(ROWS).flip(0).cuda()
            like = torch.empty_like(index, device="meta")
            hold(table._prefetcher._stream(index))
            pending = table.prefetch(index)
            del index
            seen = None
            if waits != "never":
                with torch.cuda.stream(reader):
                    seen = pending.wait() * 1
            del pending
            others = dirty(torch.empty_like(like, device="cuda"), 1 << 40)
            rows = dirty(torch.empty(ROWS, WIDTH, device="cuda"), 7.0)
            if seen is not None:
                with torch.cuda.stream(reader):
                    assert torch.equal(seen.cpu(), x.flip(0))
            torch.cuda.synchronize()
            # Nor does the gather write into what has the rows' memory by then.
            assert all((other == 1 << 40).all() for other in others)
            assert all((other == 7).all() for other in rows)
            table.check()


@pytest.mark.parametrize("unique", [False, True])
def test_prefetches_dropped_in_any_order_harm_nobody(late, x, unique):
    for seed in SEEDS:
        late(seed)
        with FeatureTable(x, **TABLES["adaptive"]) as table:
            kept = []
            for i, index in enumerate(make_indices(12)):
                pending = table.prefetch(index.cuda(), unique=unique)
                if i % 3 == 0:
                    kept.append((index, pending))
                del pending
                dirty(torch.empty(400, WIDTH, device="cuda"), float("nan"))
            for index, pending in reversed(kept):
                assert torch.equal(pending.wait().cpu(), x[index])
            table.check()


@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_prefetch_that_fails_leaves_no_writer_behind(late, held, x, monkeypatch, fails):
    """Its rows' memory goes back behind the gather, which may have been queued already."""
    late(0)

    def fail(self, index):
        raise IndexError("met by an earlier gather")

    index = torch.arange(ROWS).cuda()
    with FeatureTable(x, **TABLES["adaptive"]) as table:
        table[index]
        torch.cuda.synchronize()
        with monkeypatch.context() as patch, held(table._prefetcher._stream(index)):
            patch.setattr(HotTier, fails, fail)
            with contextlib.suppress(IndexError):  # pytest.raises would keep the rows
                table.prefetch(index)
                raise AssertionError("it did not fail")
            others = dirty(torch.empty(ROWS, WIDTH, device="cuda"), 7.0)
        torch.cuda.synchronize()
        assert all((other == 7).all() for other in others)


def test_stats_wait_for_the_gathers_of_every_stream(late, held, x):
    late(0)
    side, index, found = torch.cuda.Stream(), torch.arange(ROWS).cuda(), []
    with FeatureTable(x, **TABLES["static"]) as table:
        table[index]
        torch.cuda.synchronize()
        thread = threading.Thread(target=lambda: found.append(table.stats()))
        with held(side):
            with torch.cuda.stream(side):
                table[index]
            thread.start()
            thread.join(0.2)
        thread.join()
        assert found[0].num_hot_rows == 2 * NUM_HOT
        cold = 2 * (ROWS - NUM_HOT) * WIDTH * 4
        assert found[0].nbytes["host->device"] == cold == table.stats().nbytes["host->device"]


@pytest.mark.parametrize("kind", TABLES)
def test_closed_with_gathers_under_way(late, x, kind):
    """Nobody reads the host's memory after the table has let go of it."""
    index = torch.arange(ROWS).cuda()
    for seed in (0, *SEEDS):
        late(seed)
        own = x.clone()
        table = FeatureTable(own, **TABLES[kind])
        right = table[index.cpu()]
        pending = [table.prefetch(index) for _ in range(3)]
        side = torch.cuda.Stream()
        hold(table._prefetcher._stream(index))
        hold(side)
        with torch.cuda.stream(side):
            rows = table[index]
        pending.append(table.prefetch(index))
        stored = table._rows._memory.x
        table.close()
        stored.zero_()
        with torch.cuda.stream(side):
            assert torch.equal(rows.cpu(), right)
        for prefetch in pending:
            assert torch.equal(prefetch.wait().cpu(), right)


def test_dropped_without_being_closed(late, x):
    index = torch.arange(ROWS).cuda()
    for seed in (0, *SEEDS):
        late(seed)
        for kind in TABLES:
            own = x.clone()
            table = FeatureTable(own, **TABLES[kind])
            right, stored = table[index.cpu()], table._rows._memory.x
            side = torch.cuda.Stream()
            table[index]
            torch.cuda.synchronize()
            hold(side)
            with torch.cuda.stream(side):
                rows = table[index]
            del table
            gc.collect()
            stored.zero_()
            dirty(torch.empty(NUM_HOT, WIDTH, device="cuda"), float("nan"))
            with torch.cuda.stream(side):
                assert torch.equal(rows.cpu(), right), (seed, kind)


# --- wrong indices --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "int8", "adaptive"])
def test_wrong_indices_of_every_stream_are_counted_once(late, held, x, kind):
    for seed in (0, *SEEDS):
        late(seed)
        index = torch.tensor([0, ROWS, 3, -ROWS - 1], device="cuda")
        table, found = FeatureTable(x, **TABLES[kind]).register(), []
        with held():  # or the second gather would raise what the first has met
            for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    found.append(table[index])
        with pytest.raises(IndexError, match="4 wrong indices"):
            table.check()
        table.check()
        for rows in found:
            assert torch.equal(rows[::2].cpu(), table[index[::2].cpu()]) and not rows[1::2].any()
        table.close()


# --- from disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["gather", "prefetch", "unique ahead"])
@pytest.mark.parametrize("engine", ["threads", "auto"])
def test_rows_of_files_pass_through_pinned_memory(late, x, tmp_path, way, engine):
    np.save(tmp_path / "x.npy", x.clone().numpy())
    indices = make_indices(10)
    for seed in (0, *SEEDS):
        late(seed)
        streams, found = [torch.cuda.Stream() for _ in range(3)], []
        with FeatureTable.open(tmp_path / "x.npy", engine=engine, cache_bytes=1 << 15) as table:
            for i, index in enumerate(indices):
                with torch.cuda.stream(streams[i % 3]):
                    hold(streams[i % 3])
                    index = index.cuda().flip(0)
                    if way == "gather":
                        rows = table[index]
                    else:
                        rows = table.prefetch(index, unique=way != "prefetch").wait()
                    found.append(rows * 1)
                    del rows, index
                    dirty(torch.empty(400, WIDTH, device="cuda"), float("nan"))
            torch.cuda.synchronize()
            for rows, index in zip(found, indices, strict=True):
                assert torch.equal(rows.cpu(), x[index.flip(0)]), seed


def test_rows_of_files_ahead_read_on_another_stream_or_never(late, x, tmp_path):
    np.save(tmp_path / "x.npy", x.clone().numpy())
    reader = torch.cuda.Stream()
    for seed in (0, *SEEDS):
        late(seed)
        with FeatureTable.open(tmp_path / "x.npy") as table:
            for index in make_indices(6):
                hold()
                pending = table.prefetch(index.cuda())
                table.prefetch(index.cuda())  # and let go
                hold(reader)
                with torch.cuda.stream(reader):
                    rows = pending.wait()
                    seen = rows * 1
                del rows, pending
                others = dirty(torch.empty(400, WIDTH, device="cuda"), 7.0)
                with torch.cuda.stream(reader):
                    assert torch.equal(seen.cpu(), x[index]), seed
                torch.cuda.synchronize()
                assert all((other == 7).all() for other in others)


def test_rows_of_files_by_cufile(late, x, tmp_path, cufile, monkeypatch):
    """Which is ordered with no stream, so the host waits for whatever used the memory before."""
    monkeypatch.setattr("dataeff.features.disk_rows.os.O_DIRECT", 0)  # the fake reads any bytes
    np.save(tmp_path / "x.npy", x.clone().numpy())
    for seed in (0, *SEEDS):
        late(seed)
        with FeatureTable.open(tmp_path / "x.npy", engine="cufile") as table:
            for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
                for index in make_indices(3, 60):
                    with torch.cuda.stream(stream):
                        index = index.cuda()
                        for width in (60, len(index.unique())):
                            dirty(torch.empty(width, WIDTH, device="cuda"), 7.0)
                        hold(stream)
                        for width in (60, len(index.unique())):
                            dirty(torch.empty(width, WIDTH, device="cuda"), float("nan"))
                        hold(stream)
                        pending = table.prefetch(index)
                        rows = table[index]
                        del index
                        assert torch.equal(rows.cpu(), pending.wait().cpu())
        assert cufile.num_reads


# --- the loader -----------------------------------------------------------------------------------


def make_graph(num_edges=6000):
    generator = torch.Generator().manual_seed(2)
    return CSCGraph(torch.randint(ROWS, (2, num_edges), generator=generator), num_nodes=ROWS)


@pytest.mark.parametrize("kind", ["plain", "adaptive", "disk"])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_loader_brings_what_the_plain_loop_brings(late, x, tmp_path, kind, num_threads):
    sampler = NeighborSampler(make_graph(), [4, 3])
    items = [(torch.arange(40) + 20 * i, i) for i in range(10)]
    np.save(tmp_path / "x.npy", x.clone().numpy())

    def sample(item):
        return sampler.sample(item[0], seed=item[1])

    expected = [x[sample(item).n_id] for item in items]
    for seed in (0, *SEEDS):
        late(seed)
        table = (
            FeatureTable.open(tmp_path / "x.npy")
            if kind == "disk"
            else FeatureTable(x, **TABLES[kind])
        )
        with table:
            loader = FeatureLoader(items, table, sample, num_threads=num_threads, device="cuda")
            train = torch.cuda.Stream()
            found = []
            with torch.cuda.stream(train):
                for _, rows in loader:
                    hold()  # training is slow
                    found.append(rows * 1)
                    rows.fill_(float("nan"))
                for rows, right in zip(found, expected, strict=True):
                    assert torch.equal(rows.cpu(), right), seed


@pytest.mark.parametrize("moved", ["by the reader", "by the sampler"])
@pytest.mark.parametrize("rank", [0, 1])
def test_threads_of_a_loader_sample_on_the_reader_s_device(late, x, moved, rank):
    """On a stream of theirs: behind what made the seeds, before whoever reads the sample."""
    sampler = NeighborSampler(make_graph(), [4, 3])
    ids = [torch.arange(40) + 20 * i for i in range(8)]
    expected = [sampler.sample(seeds, seed=i) for i, seeds in enumerate(ids)]

    def draw():
        for i, seeds in enumerate(ids):
            if moved == "by the reader":
                hold()
                seeds = seeds.cuda() + 0
                dirty(torch.empty(40, dtype=torch.long, device="cuda"), 1 << 40)
            yield seeds, i

    def sample(item):
        return sampler.sample(item[0].cuda(), seed=item[1])

    for seed in (0, *SEEDS):
        late(seed)
        with torch.cuda.device(rank), FeatureTable(x) as table:
            found = []
            with torch.cuda.stream(torch.cuda.Stream()):
                for batch, rows in FeatureLoader(draw(), table, sample, num_threads=2):
                    hold()
                    found.append((batch.n_id + 0, batch.edge_index + 0, rows * 1))
                    del batch, rows
                torch.cuda.synchronize()
            assert len(found) == len(expected)
            for (n_id, edge_index, rows), right in zip(found, expected, strict=True):
                assert n_id.device == rows.device == torch.device("cuda", rank)
                assert torch.equal(n_id.cpu(), right.n_id), seed
                assert torch.equal(edge_index.cpu(), right.edge_index), seed
                assert torch.equal(rows.cpu(), x[right.n_id]), seed


@pytest.mark.parametrize("kind", ["plain", "adaptive"])
def test_a_loader_that_is_left_or_fails_leaves_the_next_one_right(late, x, kind):
    indices = make_indices(8)

    def sample(i):
        if i == 5:
            raise KeyError("sample 5")
        return indices[i]

    for seed in SEEDS:
        late(seed)
        with FeatureTable(x, **TABLES[kind]) as table:
            loader = FeatureLoader(range(8), table, sample, device="cuda")
            for leave in (0, 2):
                for i, (index, rows) in enumerate(loader):
                    right = x[index]
                    hold()
                    seen = rows * 1
                    if i == leave:
                        break
                del rows
                dirty(torch.empty(400, WIDTH, device="cuda"), float("nan"))
                dirty(torch.empty(400, dtype=torch.long, device="cuda"), 1 << 40)
                assert torch.equal(seen.cpu(), right)
            found = []
            with pytest.raises(KeyError, match="sample 5"):
                for _, rows in loader:
                    found.append(rows)
            assert len(found) == 5
            for rows, index in zip(found, indices, strict=False):
                assert torch.equal(rows.cpu(), x[index])
            table.check()


@pytest.mark.parametrize("kind", ["plain", "adaptive"])
@pytest.mark.parametrize("reader", ["default", "its own"])
def test_threads_of_a_loader_deliver_to_whoever_takes_the_batches(late, x, kind, reader):
    """On a stream of theirs, whose memory a batch that is let go comes back to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data_module = pytest.importorskip("torch_geometric.data")
        from dataeff.integrations.pyg import NeighborLoader
    edges = torch.randint(ROWS, (2, 4000), generator=torch.Generator().manual_seed(2))
    for seed in (0, SEEDS[-1]):
        late(seed)
        train = torch.cuda.current_stream() if reader == "default" else torch.cuda.Stream()
        with FeatureTable(x, **TABLES[kind]) as table:
            data = data_module.Data(x=table, edge_index=edges, num_nodes=ROWS)
            loader = NeighborLoader(data, [4, 3], batch_size=90, num_workers=2, device="cuda")
            found = []
            with torch.cuda.stream(train):
                for _ in range(2):
                    for batch in loader:
                        hold()
                        found.append((batch.n_id + 0, batch.x * 1, batch.edge_index + 0))
                        del batch
                    next(iter(loader))  # and left
                torch.cuda.synchronize()
                for n_id, rows, edge_index in found:
                    assert torch.equal(rows.cpu(), x[n_id.cpu()]), seed
                    assert edge_index.max() < len(n_id)
            table.check()


# --- rows that learn ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_the_host_train_from_indices_of_the_device(late, dtype):
    """Each step's gather reads the rows that the last step's optimizer wrote."""
    indices = [index % 60 for index in make_indices(5)]
    weights = torch.randn(400, 16, generator=torch.Generator().manual_seed(3)).to(dtype)

    def train(place):
        torch.manual_seed(0)
        rows = HostEmbedding(60, 16, padding_idx=2, dtype=dtype)
        optimizer = torch.optim.SGD(rows.parameters(), lr=0.5)
        streams = [torch.cuda.Stream() for _ in range(2)]
        for i, index in enumerate(indices):
            optimizer.zero_grad()
            with torch.cuda.stream(streams[i % 2] if place == "cuda" else None):
                if place == "cuda":
                    hold()
                (rows(index.to(place)) * weights.to(place)).sum().backward()
            optimizer.step()
        return rows.weight.detach().clone()

    expected = train("cpu")
    for seed in (0, *SEEDS):
        late(seed)
        torch.testing.assert_close(train("cuda"), expected)


# --- unified tensors ------------------------------------------------------------------------------


def test_the_cpu_reads_what_the_device_has_written(late, x):
    for seed in (0, *SEEDS):
        late(seed)
        u, side = dataeff.unified(x.clone()), torch.cuda.Stream()
        y = torch.randn(ROWS, WIDTH).cuda()
        for stream in (torch.cuda.current_stream(), side):
            hold(stream)
            with torch.cuda.stream(stream):
                u.add_(y)
            torch.testing.assert_close(u.cpu(), x + (1 + (stream == side)) * y.cpu())


def saved(u):
    file = io.BytesIO()
    torch.save(u, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "look",
    [
        copy.deepcopy,
        lambda u: pickle.loads(pickle.dumps(u)),
        lambda u: pickle.loads(ForkingPickler.dumps(u)),
        saved,
        repr,
        lambda u: f"{u[0, 0]:.3f}",
        lambda u: f"{u}",
    ],
    ids=["deepcopy", "pickle", "send", "save", "repr", "format", "str"],
)
def test_what_the_device_has_written_is_copied_sent_and_shown(late, x, look):
    for seed in (0, *SEEDS):
        late(seed)
        u = dataeff.unified(x.clone())
        hold()
        u.add_(torch.ones((), device="cuda"))
        seen, expected = look(u), look(dataeff.unified(x + 1))
        assert torch.equal(seen, expected) if isinstance(seen, torch.Tensor) else seen == expected


def test_the_cpu_writes_after_what_the_device_reads(late, x):
    index = torch.arange(ROWS).cuda()
    for seed in (0, *SEEDS):
        late(seed)
        u, side = dataeff.unified(x.clone()), torch.cuda.Stream()
        hold()
        rows = u[index]
        hold(side)
        with torch.cuda.stream(side):
            sums = u.to("cuda") + 1
        u.zero_()
        torch.cuda.synchronize()
        assert torch.equal(rows.cpu(), x) and torch.equal(sums.cpu(), x + 1)


@pytest.mark.parametrize("again", [False, True])
def test_the_cpu_writes_after_what_backward_reads(late, x, again):
    """Autograd keeps the alias of the device until backward has read it."""
    side = torch.cuda.Stream()
    for seed in (0, *SEEDS):
        late(seed)
        u = dataeff.unified(x.clone())
        h = torch.randn(ROWS, WIDTH).cuda().requires_grad_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = u * h
        torch.cuda.synchronize()
        assert torch.equal(u.cpu(), x)  # the forward is done
        hold(side)
        with torch.cuda.stream(side):
            y.sum().backward(retain_graph=again)
        u.zero_()
        torch.cuda.synchronize()
        assert torch.equal(h.grad.cpu(), x)


def test_memory_of_a_unified_tensor_stays_until_the_device_has_read_it(late, x):
    for seed in (0, *SEEDS):
        late(seed)
        own = x.clone()
        u = dataeff.unified(own)
        hold()
        rows = u * torch.tensor(2.0, device="cuda")
        del u
        gc.collect()
        own.zero_()
        assert torch.equal(rows.cpu(), x * 2), seed


# --- the sampler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"replace": True}, {"induced": True}, {"disjoint": True}])
def test_samples_on_several_streams(late, options):
    sampler = NeighborSampler(make_graph(), [5, 3], **options)
    batches = [torch.arange(30) + 17 * i for i in range(6)]
    expected = [sampler.sample(seeds, seed=i) for i, seeds in enumerate(batches)]
    for seed in (0, *SEEDS):
        late(seed)
        streams, found = [torch.cuda.Stream() for _ in range(3)], []
        for i, seeds in enumerate(batches):
            with torch.cuda.stream(streams[i % 3]):
                found.append(sampler.sample(seeds.cuda(), seed=i))
                dirty(torch.empty(600, dtype=torch.long, device="cuda"), 1 << 40)
        torch.cuda.synchronize()
        for there, here in zip(found, expected, strict=True):
            for name in ("n_id", "edge_index", "e_id"):
                assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), (seed, name)


def test_a_sample_feeds_a_table_and_a_layer_from_several_threads(late, x):
    sampler = NeighborSampler(make_graph(), [5, 3])
    layer = nn.Linear(WIDTH, 4).cuda()
    expected = []
    for i in range(4):
        n_id = sampler.sample(torch.arange(50) + i, seed=i).n_id
        expected.append((x[n_id].cuda() @ layer.weight.t() + layer.bias).detach().cpu())
    for seed in SEEDS:
        late(seed)
        with FeatureTable(x, **TABLES["adaptive"]) as table:
            found, wrong = [None] * 4, []

            def run(i, table=table, found=found, wrong=wrong):
                try:
                    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                        for _ in range(3):
                            block = sampler.sample((torch.arange(50) + i).cuda(), seed=i)
                            found[i] = layer(table[block.n_id]).cpu()
                except Exception as error:
                    wrong.append(error)

            threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong
            for rows, right in zip(found, expected, strict=True):
                torch.testing.assert_close(rows, right)
