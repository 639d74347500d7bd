"""Captured CUDA graphs: what must not end a capture, and replays beside eager work.

By CUDA's rules a wait for a device ends every capture on it, and the query of an event those that
are global, whichever thread asks: a collection of garbage may run in any.
"""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import dataeff
from dataeff import ActivationOffload, FeatureTable, HostEmbedding, HotRows, _core, rgnn
from dataeff.features.adaptive import AdaptivePlacement
from dataeff.nn.published import PUBLISHED
from dataeff.sampling import CSCGraph, NeighborSampler

ROWS, WIDTH = 600, 16


@pytest.fixture
def x():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def hold(stream=None):
    """Lets what is queued on a stream from now on begin late."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1)


def in_another_thread(work):
    """Runs it to its end; what it raises comes out here, also from `__del__`."""
    wrong = []

    def run():
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in wrong:
        raise error


def capture_around(work, mode="global", stream=None):
    """Captures `y = 2 * z` around `work`, then replays it; the capture must have lived."""
    z, captured = torch.ones(5, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, capture_error_mode=mode, stream=stream):
        y = z * 2
        work()
        y = y + 0
    z.fill_(4)
    captured.replay()
    assert y.tolist() == [8] * 5


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_the_rules_are_kept(mode):
    """What these tests rest on; torch itself is refused as by a driver."""
    event = torch.cuda.Event()
    event.record()
    for ends, work in ((True, torch.cuda.synchronize), (mode == "global", event.query)):
        captured = torch.cuda.CUDAGraph()
        told = pytest.raises(torch.AcceleratorError) if ends else pytest.warns(UserWarning)
        with told, torch.cuda.graph(captured, capture_error_mode=mode):
            in_another_thread(work)
        torch.cuda.synchronize()


@pytest.mark.parametrize("mode", ["global", "thread_local"])
@pytest.mark.parametrize("thread", ["own", "another"])
def test_tables_collected_during_a_capture(late, x, mode, thread):
    late(0)
    tables = [FeatureTable(x).register()]
    tables[0][torch.arange(9).cuda()]
    torch.cuda.synchronize()

    def collect():
        tables.clear()
        gc.collect()
        if thread == "another" and mode == "thread_local":  # which lets this thread register
            others.append(FeatureTable(torch.randn(3, 4)).register())

    others = []
    capture_around(collect if thread == "own" else lambda: in_another_thread(collect), mode)
    assert _core.is_registered(x.data_ptr(), x.nbytes)
    FeatureTable(torch.randn(3, 4)).register().close()
    assert not _core.is_registered(x.data_ptr(), x.nbytes)


@pytest.mark.parametrize("thread", ["own", "another"])
def test_offloads_collected_during_a_capture(late, thread):
    late(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).cuda()
    held = [ActivationOffload(model, host_bytes=1 << 20, min_bytes=0, in_flight_bytes=0)]
    with held[0]:
        model(torch.randn(64, 64, device="cuda")).sum().backward()
    assert held[0].report().bytes_host > 0
    torch.cuda.synchronize()

    def collect():
        held.clear()
        gc.collect()

    capture_around(collect if thread == "own" else lambda: in_another_thread(collect))
    ActivationOffload(model, host_bytes=1 << 20).close()


@pytest.mark.parametrize("thread", ["own", "another"])
def test_graphs_of_several_streams_collected_during_a_capture(late, thread):
    late(0)
    pytest.importorskip("triton")
    layer = PUBLISHED["rgcn"]
    shapes = layer.shapes(8, 1, 2, 16, 1, 16)
    args = {name: torch.randn(*shape, device="cuda") for name, shape in shapes.items()}
    edges = torch.randint(8, (2, 30), device="cuda")
    graphs = [rgnn.Graph(edges, edges[0] % 2, num_nodes=8, num_relations=2)]
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for stream in streams:
        with torch.cuda.stream(stream):
            layer.layer(graphs[0], **args, **layer.statics(1))
    torch.cuda.synchronize()

    def collect():
        graphs.clear()
        gc.collect()

    work = collect if thread == "own" else lambda: in_another_thread(collect)
    capture_around(work, stream=streams[1])


def test_prefetches_dropped_while_their_stream_is_captured(late, held, x):
    late(0)
    stream = torch.cuda.Stream()
    with FeatureTable(x) as table:
        table.register()
        side = table._prefetcher._stream(torch.arange(1).cuda())
        with torch.cuda.stream(stream):
            index = torch.arange(ROWS).cuda()
            pending = [table.prefetch(index)]
        torch.cuda.synchronize()
        with held(side):
            with torch.cuda.stream(stream):
                pending.append(table.prefetch(index.clone()))
            captured, z = torch.cuda.CUDAGraph(), torch.ones(5, device="cuda")
            with torch.cuda.stream(stream):
                captured.capture_begin()
                y = z * 2
                pending.clear()
                y = y + 0
                captured.capture_end()
                others = [torch.full((ROWS,), 1 << 40, device="cuda") for _ in range(6)]
                rows = [torch.full((ROWS, WIDTH), 7.0, device="cuda") for _ in range(6)]
        torch.cuda.synchronize()
        z.fill_(4)
        captured.replay()
        assert y.tolist() == [8] * 5
        assert all((a == 1 << 40).all() for a in others) and all((a == 7).all() for a in rows)
        with torch.cuda.stream(stream):
            assert torch.equal(table.prefetch(index).wait().cpu(), x)
        table.check()


def test_a_replay_sees_no_half_of_a_move(late, x, monkeypatch):
    """The rows are where they go, and their places are not yet said to be there."""
    late(0)
    commit, side = AdaptivePlacement.commit, torch.cuda.Stream()

    def commit_late(self, move):
        hold(torch.cuda.current_stream())
        commit(self, move)

    monkeypatch.setattr(AdaptivePlacement, "commit", commit_late)
    with FeatureTable(x, hot=HotRows(64, policy="adaptive", every=1)) as table:
        table.register()
        index, captured = torch.arange(ROWS).cuda(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            rows = table[index]
        for step in range(6):
            wanted = (torch.arange(40 * step, 40 * step + 200).repeat(2) % ROWS).cuda()
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                found = table[wanted]
            captured.replay()
            torch.cuda.synchronize()
            assert torch.equal(rows.cpu(), x) and torch.equal(found.cpu(), x[wanted.cpu()])
        assert table._rows._tiers[index.device].num_moved() > 10


def test_a_move_waits_for_replays_before_it(late, held, x):
    late(0)
    side = torch.cuda.Stream()
    with FeatureTable(x, hot=HotRows(64, policy="adaptive", every=1)) as table:
        table.register()
        index, captured = torch.arange(ROWS).cuda(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            rows = table[index]
        torch.cuda.synchronize()
        with held():
            captured.replay()
            with torch.cuda.stream(side):
                found = table[index]
            for _ in range(50):  # long enough for one that does not wait
                assert not side.query()
                time.sleep(0.002)
        torch.cuda.synchronize()
        assert torch.equal(rows.cpu(), x) and torch.equal(found.cpu(), x)


def test_replays_of_two_gathers_of_one_table_on_two_streams(late, x):
    late(0)
    hot = HotRows(64, policy="adaptive", every=1)
    with FeatureTable(x, hot=hot) as table:
        table.register()
        index, graphs = torch.arange(ROWS).cuda(), []
        table[index]
        for _ in range(2):
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                rows = table[index] * 1
            graphs.append((captured, torch.cuda.Stream(), rows))
        torch.cuda.synchronize()
        for _ in range(3):
            for captured, stream, _ in graphs:
                hold(graphs[0][1])
                with torch.cuda.stream(stream):
                    captured.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(rows.cpu(), x) for _, _, rows in graphs)


def test_what_waits_is_refused_and_the_capture_lives(late, x, tmp_path):
    late(0)
    np.save(tmp_path / "x.npy", x.numpy())
    index = torch.arange(30).cuda()
    table, rows = FeatureTable(x, hot=HotRows(10)).register(), HostEmbedding(ROWS, WIDTH)
    disk = FeatureTable.open(tmp_path / "x.npy")
    sampler = NeighborSampler(CSCGraph(torch.randint(ROWS, (2, 4000)), num_nodes=ROWS), [4])

    def learn():
        rows(index).sum().backward()

    calls = {
        "rows from disk": lambda: disk[index],
        "a thread that gathers": lambda: disk.prefetch(index),
        "the number of different rows": lambda: table.gather(index, unique=True),
        "the gradient of rows in host memory": learn,
        "the number of nodes of a sample": lambda: sampler.sample(index),
    }
    waits = {
        "check": table.check,
        "stats": table.stats,
        "share": table.share_,
        "scatter": lambda: table.scatter_(torch.tensor([0]), x[:1]),
        "close": table.close,
    }
    for call in (*calls.values(), waits["check"], waits["stats"]):
        call()
    torch.cuda.synchronize()

    def refused():
        for name, call in calls.items():
            with pytest.raises(RuntimeError, match=f"a CUDA graph is being captured.*{name}: "):
                call()
        for call in waits.values():
            with pytest.raises(RuntimeError, match=r"captured.*the gathers under way: .* after it"):
                call()

    capture_around(refused)
    assert torch.equal(disk[index].cpu(), x[:30])
    disk.close()


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_a_wrong_index_of_another_thread_waits_for_the_end_of_a_capture(late, x, mode):
    late(0)
    index, wrong = torch.arange(30).cuda(), torch.tensor([ROWS], device="cuda")
    with FeatureTable(x).register() as table:
        table[wrong]
        torch.cuda.synchronize()
        index_of_mine = index.clone()
        capture_around(lambda: in_another_thread(lambda: table[index_of_mine]), mode)
        with pytest.raises(IndexError, match="1 wrong indices"):
            table[index]


@pytest.mark.parametrize("graph", ["gathers", "reads", "writes"])
@pytest.mark.parametrize("access", ["read", "write"])
def test_the_cpu_waits_for_replays_that_are_in_its_way(late, held, x, graph, access):
    late(0)
    u, index = dataeff.unified(x.clone()).register(), torch.arange(ROWS).cuda()
    ones, captured = torch.ones(WIDTH, device="cuda"), torch.cuda.CUDAGraph()
    u[index], u + ones
    torch.cuda.synchronize()
    with torch.cuda.graph(captured):
        found = {
            "gathers": lambda: u[index],
            "reads": lambda: u + ones,
            "writes": lambda: u.add_(ones),
        }[graph]()
    torch.cuda.synchronize()
    seen = []

    def touch():
        if access == "write":
            u[0] = 100.0
        seen.append(u.sum())

    thread = threading.Thread(target=touch)
    with held():
        captured.replay()
        thread.start()
        thread.join(0.2)
        assert bool(seen) == (access == "read" and graph != "writes")
    thread.join()
    expected = x + 1 if graph == "writes" else x
    if access == "write" and graph == "writes":
        expected[0] = 100.0
    expected = expected + 1 if graph == "reads" else expected
    assert torch.equal(found.cpu(), expected)
