"""Rows on their way to where they are used: loaders, files, other processes; and who waits.

What needs no GPU runs on the CPU too.
"""

import contextlib
import gc
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dataeff import FeatureLoader, FeatureTable, HotRows, _core
from dataeff.sampling import CSCGraph, HeteroNeighborSampler, NeighborSampler
from dataeff.sampling.on_device import DeviceSampler

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and _core.cuda_built), reason="needs a CUDA GPU and CUDA build"
)
NODES, WIDTH = 3000, 40
sys.path.insert(0, str(Path(__file__).parent))  # a spawned process finds it by its name
from table_reader import read_some_rows  # noqa: E402


@pytest.fixture
def x():
    return torch.randn(NODES, WIDTH)


def random_graph(num_edges=30_000):
    return torch.randint(NODES, (2, num_edges))


TABLES = {
    "plain": {},
    "int8": {"store": "int8"},
    "sorted": {"sort": True},
    "hot": {"hot": HotRows(300)},
    "adaptive": {"hot": HotRows(300, policy="adaptive", every=1)},
    "adaptive fp8": {"store": "fp8", "hot": HotRows(300, policy="adaptive", every=1)},
}


def test_a_test_of_waits_leaves_no_mode_behind(monkeypatch, waits_are_errors):
    """torch says once that the mode is a prototype, and warnings are errors."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        if mode == "error":
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(KeyError), waits_are_errors():
        raise KeyError
    assert modes == ["error", "default"]


@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_context_ends_the_worker_and_no_other(monkeypatch, request, lost):
    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def leave(code):
        raise SystemExit(code)

    (conftest,) = (
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, "__file__", None) == str(Path(__file__).parents[1] / "conftest.py")
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    conftest.pytest_runtest_logfinish()  # of a run in one process
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with pytest.raises(SystemExit) if lost else contextlib.nullcontext():
        conftest.pytest_runtest_logfinish()


@needs_cuda
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_gather_never_makes_the_host_wait(x, kind, ahead, waits_are_errors):
    indices = [torch.randint(NODES, (700,), device="cuda") for _ in range(6)]
    with FeatureTable(x, **TABLES[kind]) as table:
        expected = [table[index.cpu()] for index in indices]

        def gather(index):
            return table.prefetch(index).wait() if ahead else table[index]

        gather(indices[0])
        torch.cuda.synchronize()
        with waits_are_errors():
            found = [gather(index) for index in indices]
        for rows, right in zip(found, expected, strict=True):
            assert torch.equal(rows.cpu(), right)


@needs_cuda
@pytest.mark.parametrize("kind", TABLES)
def test_the_first_gather_on_one_stream_serves_the_next_on_another(x, kind):
    with FeatureTable(x, **TABLES[kind]) as table:
        index = torch.arange(NODES, device="cuda")
        expected = table[torch.arange(NODES)]
        pending = table.prefetch(index)
        rows = table[index]
        assert torch.equal(rows.cpu(), expected) and torch.equal(pending.wait().cpu(), expected)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", ["hot", "adaptive"])
def test_hot_rows_of_dtypes_that_torch_does_little_with(kind, dtype):
    """They move, and what is written reaches them."""
    bits = torch.randint(100, (NODES, WIDTH * dtype.itemsize), dtype=torch.uint8)
    with FeatureTable(bits.view(dtype), **TABLES[kind]) as table:
        for _ in range(6):
            index = torch.randint(NODES, (700,))
            assert torch.equal(table[index.cuda()].cpu().view(torch.uint8), bits[index])
        written = torch.arange(0, NODES, 3)
        rows = torch.full((len(written), WIDTH * dtype.itemsize), 101, dtype=torch.uint8)
        table.scatter_(written.cuda(), rows.cuda().view(dtype))
        everything = torch.arange(NODES, device="cuda")
        assert torch.equal(table[everything].cpu().view(torch.uint8), bits)
        assert (bits[written] == 101).all()


@needs_cuda
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_rows_that_are_let_go_while_they_are_read_stay(x, tmp_path, where, elsewhere):
    """The next gather, under way already, does not get their memory before the reader is done."""
    np.save(tmp_path / "x.npy", x.clone().numpy())
    table = FeatureTable(x) if where == "memory" else FeatureTable.open(tmp_path / "x.npy")
    reader = torch.cuda.Stream() if elsewhere else torch.cuda.current_stream()
    with table:
        for _ in range(20):
            index, other = (torch.randint(NODES, (2000,), device="cuda") for _ in range(2))
            pending = table.prefetch(index)
            following = table.prefetch(other)
            with torch.cuda.stream(reader):
                rows = pending.wait()
                torch.cuda._sleep(5_000_000)  # what is queued behind it is late
                seen = rows.clone()
                del rows, pending
            if elsewhere:
                torch.full((2000, WIDTH), float("nan"), device="cuda")  # where the rows were
                torch.cuda.current_stream().wait_event(reader.record_event())
            assert torch.equal(following.wait().cpu(), x[other.cpu()])
            assert torch.equal(seen.cpu(), x[index.cpu()])


@needs_cuda
def test_abandoned_prefetches_read_no_wrong_index(x):
    with FeatureTable(x) as table:
        for _ in range(50):
            table.prefetch(torch.randint(NODES, (20_000,), device="cuda"))  # and let go
            torch.full((20_000,), 1 << 40, device="cuda")  # where the index was
        table.check()


@needs_cuda
def test_closing_waits_for_what_is_under_way(x):
    table = FeatureTable(x)
    index = torch.randint(NODES, (100_000,), device="cuda")
    pending = [table.prefetch(index) for _ in range(4)]
    table.close()
    for prefetch in pending:
        assert torch.equal(prefetch.wait().cpu(), x[index.cpu()])
    with pytest.raises(RuntimeError, match="closed"):
        table.prefetch(index)
    assert not _core.is_registered(x.data_ptr(), x.nbytes)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_loader_brings_what_the_plain_loop_brings(x, device, num_threads):
    sampler = NeighborSampler(CSCGraph(random_graph(), num_nodes=NODES), [5, 3])
    items = [(torch.randint(NODES, (64,)), seed) for seed in range(12)]

    def sample(item):
        return sampler.sample(item[0], seed=item[1])

    with FeatureTable(x) as table:
        loader = FeatureLoader(items, table, sample, num_threads=num_threads, device=device)
        for item, (batch, rows) in zip(items, loader, strict=True):
            assert rows.device.type == device.type
            assert torch.equal(batch.n_id, sample(item).n_id)
            assert torch.equal(rows.cpu(), x[batch.n_id])
        for batch, rows in loader:  # and ends cleanly in the middle
            assert len(rows) == len(batch.n_id)
            break


@needs_cuda
def test_threads_of_a_loader_sample_on_the_gpu_beside_the_reader(x):
    sampler = NeighborSampler(CSCGraph(random_graph(), num_nodes=NODES), [5, 3])
    ids = [torch.randperm(NODES)[:64] for _ in range(12)]

    def draw():
        for i, seeds in enumerate(ids):
            torch.cuda._sleep(5_000_000)  # the seeds are late
            yield seeds.cuda() + 0, i

    def sample(item):
        return sampler.sample(item[0], seed=item[1])

    with FeatureTable(x) as table, torch.cuda.stream(torch.cuda.Stream()):
        found = []
        for batch, rows in FeatureLoader(draw(), table, sample, num_threads=2):
            torch.cuda._sleep(5_000_000)
            found.append((batch.n_id + 0, rows * 1))
            del batch, rows
        for i, (n_id, rows) in enumerate(found):
            right = sampler.sample(ids[i], seed=i).n_id
            assert torch.equal(n_id.cpu(), right) and torch.equal(rows.cpu(), x[right])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["plain", "int8", "adaptive"])
def test_pyg_s_loader_delivers_where_it_is_told_to(x, device, num_workers, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data_module = pytest.importorskip("torch_geometric.data")
        from dataeff.integrations.pyg import NeighborLoader
    with FeatureTable(x, **TABLES[kind]) as table:
        data = data_module.Data(
            x=table, y=torch.arange(NODES), edge_index=random_graph(), num_nodes=NODES
        )
        loader = NeighborLoader(
            data, [5, 3], batch_size=256, num_workers=num_workers, device=device, shuffle=True
        )
        expected = table[torch.arange(NODES)].to(device)
        right = torch.ones((), dtype=torch.bool, device=device)
        for batch in loader:
            assert batch.x.device.type == batch.edge_index.device.type == device.type
            # Nothing waits here: batches are read by the stream that computes.
            right &= (batch.x == expected[batch.n_id]).all() & (batch.y == batch.n_id).all()
            batch.x.fill_(float("nan"))
        assert right


@needs_cuda
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("per_worker", [True, False])
@pytest.mark.parametrize("what", ["nodes", "mask", "timed", "typed", "links", "bidirectional"])
def test_pyg_s_loader_samples_on_the_gpu_that_its_seeds_are_on(
    x, monkeypatch, per_worker, num_workers, what
):
    """Batches are those of seeds on the host."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data_module = pytest.importorskip("torch_geometric.data")
        from dataeff.integrations.pyg import LinkNeighborLoader, NeighborLoader
    edges, options = torch.randint(NODES, (2, 4000)), {}
    ids = torch.randperm(NODES)[:90]
    drawn = []

    def sample_there(self, *arguments):
        drawn.append(self.device)
        return real(self, *arguments)

    real = DeviceSampler.sample
    monkeypatch.setattr(DeviceSampler, "sample", sample_there)

    def batches(where):
        torch.manual_seed(0)
        seeds, make = ids.to(where), NeighborLoader
        data = data_module.Data(x=table, edge_index=edges, y=torch.arange(NODES))
        data.num_nodes, data.edge_attr = NODES, torch.arange(4000)
        if what == "mask":
            seeds = (torch.arange(NODES) < 80).to(where)
        elif what == "timed":
            options.update(time_attr="y", input_time=torch.full((90,), 400))
        elif what == "typed":
            data = data_module.HeteroData(a={"x": table}, b={"num_nodes": NODES})
            data["a", "to", "b"].edge_index = data["b", "to", "a"].edge_index = edges
            seeds = ("b", seeds)
        elif what == "links":
            make, seeds = LinkNeighborLoader, edges[:, :90].to(where)
            options.update(neg_sampling="binary")
        elif what == "bidirectional":
            options.update(subgraph_type="bidirectional")
        name = "edge_label_index" if what == "links" else "input_nodes"
        loader = make(
            data,
            [4, 3],
            **{name: seeds},
            batch_size=30,
            num_workers=num_workers,
            filter_per_worker=per_worker,
            device="cuda",
            **options,
        )
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [batch.clone() for batch in loader]
            torch.cuda.synchronize()
        return found

    with FeatureTable(x) as table:
        expected = batches("cpu")
        assert not drawn
        found = batches("cuda")
        assert len(drawn) == len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for store, right in zip(one.stores, other.stores, strict=True):
            for key, value in store.items():
                if isinstance(value, torch.Tensor):
                    assert value.is_cuda and torch.equal(value, right[key]), key
                else:
                    assert value == right[key], key


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_rows_of_files_arrive(x, device, tmp_path, engine):
    np.save(tmp_path / "x.npy", x.numpy())
    with FeatureTable.open(tmp_path / "x.npy", engine=engine, cache_bytes=1 << 16) as table:
        for _ in range(5):
            index = torch.randint(-NODES, NODES, (500,), device=device)
            pending = table.prefetch(index)
            assert torch.equal(table[index].cpu(), x[index.cpu()])
            assert torch.equal(table.gather(index, unique=True).cpu(), x[index.cpu()])
            assert torch.equal(pending.wait().cpu(), x[index.cpu()])
        with pytest.raises(IndexError, match=str(NODES)):
            table[torch.tensor([0, NODES], device=device)]
        assert torch.equal(table[index].cpu(), x[index.cpu()])


@pytest.mark.parametrize("kind", ["plain", "int8", "hot"])
def test_another_process_reads_the_same_memory(x, device, kind):
    context = torch.multiprocessing.get_context("spawn")
    with FeatureTable(x, **TABLES[kind]) as table:
        here = table[torch.tensor([3, 0, -1], device=device)].cpu()
        answers = context.Queue()
        child = context.Process(target=read_some_rows, args=(table, device, answers))
        child.start()
        there = answers.get(timeout=120)
        child.join(60)
        assert child.exitcode == 0 and here.tolist() == there


@pytest.mark.parametrize("how", ["timed", "last", "disjoint", "induced"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_typed_graphs_are_sampled_alike_everywhere(device, how, index_dtype):
    torch.manual_seed(0)
    timed = how in ("timed", "last")
    graphs = {
        key: CSCGraph(
            torch.randint(500, (2, 20_000)),
            num_nodes=500,
            edge_time=torch.randint(100, (20_000,)) if timed else None,
            index_dtype=index_dtype,
        )
        for key in (("a", "to", "b"), ("b", "to", "a"), ("b", "likes", "b"))
    }
    options = {} if how == "timed" else {how: True}
    sampler = HeteroNeighborSampler(graphs, {key: [4, 20] for key in graphs}, **options)
    seeds, time = {"b": torch.randperm(500)[:40]}, {"b": torch.randint(100, (40,))}
    host = sampler.sample(seeds, seed=5, seed_time=time if timed else None)
    there = sampler.sample(
        {"b": seeds["b"].to(device)},
        seed=5,
        seed_time={"b": time["b"].to(device)} if timed else None,
    )
    for node_type, ids in host.n_id.items():
        assert there.n_id[node_type].device.type == device.type
        assert torch.equal(ids, there.n_id[node_type].cpu())
    for key in graphs:
        assert torch.equal(host.edge_index[key], there.edge_index[key].cpu())
        assert torch.equal(host.e_id[key], there.e_id[key].cpu())


@needs_cuda
def test_registration_is_counted_rolled_back_and_leaves_no_error_behind(x):
    with FeatureTable(x).register() as one, FeatureTable(x[5:]).register() as other:
        one.close()
        assert _core.is_registered(x[5:].data_ptr(), x[5:].nbytes)
        assert torch.equal(other[torch.tensor([7], device="cuda")].cpu(), x[12:13])
    gc.collect()
    assert not _core.is_registered(x.data_ptr(), x.nbytes)
    y = torch.randn(1 << 20)
    taken = (y.data_ptr() + 4095) // 4096 * 4096 + (1 << 20)
    assert int(torch.cuda.cudart().cudaHostRegister(taken, 4096, 0)) == 0
    try:
        with pytest.raises(RuntimeError, match="registered by other code"):
            FeatureTable(y).register()
    finally:
        torch.cuda.cudart().cudaHostUnregister(taken)
    with FeatureTable(y).register() as table:  # nothing of the first try is left
        assert torch.equal(table[torch.tensor([7], device="cuda")].cpu(), y[7:8])
