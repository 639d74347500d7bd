"""One copy of a table for many processes, by fork and by spawn."""

import copy
import gc
import io
import multiprocessing
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

import dataeff
from dataeff import _core
from dataeff.features.pipeline import pipelined
from dataeff.features.prefetch import prefetch_in_thread
from dataeff.memory import HostBuffer, share_
from dataeff.memory.shared import shared_buffer

sys.path.insert(0, str(Path(__file__).parent))
import table_processes as processes

METHODS = ["fork", "spawn"]


def test_a_table_moves_with_its_tensor():
    x = torch.arange(12.0).view(4, 3)
    table = dataeff.FeatureTable(x)
    assert table.share_() is table
    x[2] = 7
    assert table[2].tolist() == [7, 7, 7]
    assert shared_buffer(table.x) is shared_buffer(x) is not None


@pytest.mark.parametrize("options", [{}, {"store": "fp16"}, {"hot": dataeff.HotRows(3)}], ids=str)
def test_a_table_of_a_view_keeps_no_memory_that_it_has_left(options):
    buffer = HostBuffer(64 * 2)
    there = weakref.ref(buffer)
    x = torch.frombuffer(memoryview(buffer), dtype=torch.float16).view(16, 4)
    table = dataeff.FeatureTable(x.fill_(1), **options)
    assert (table[2] == 1).all()
    table.share_()
    x[2] = 7
    assert (table[2] == 7).all() and table.x.data_ptr() == x.data_ptr()
    del x, buffer
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("store", [None, "fp16"])
@pytest.mark.parametrize("call", ["getitem", "prefetch"])
def test_rows_stay_where_they_are_read_while_another_thread_shares_them(monkeypatch, store, call):
    buffer = HostBuffer(64 * 2)
    there = weakref.ref(buffer)
    x = torch.frombuffer(memoryview(buffer), dtype=torch.float16)  # no view, whose base would stay
    table = dataeff.FeatureTable(x.fill_(1), store=store)
    del x, buffer
    seen = []

    def slow(gather, *arguments, **options):
        if not seen:
            with ThreadPoolExecutor(1) as other:
                other.submit(table.share_).result()
            seen.append(there() is not None)
        return gather(*arguments, **options)

    for name in ("gather_tensors", "gather_cpu"):
        monkeypatch.setattr(_core, name, partial(slow, getattr(_core, name)))
    index = torch.arange(64)
    rows = table[index] if call == "getitem" else table.prefetch(index).wait()
    assert (rows == 1).all() and seen == [True]
    del rows
    gc.collect()
    assert there() is None


def test_shared_takes_a_tensor_or_what_makes_it():
    for x in (torch.ones(3, 2), lambda: torch.ones(3, 2)):
        with dataeff.FeatureTable.shared(x) as table:
            assert torch.equal(table[:], torch.ones(3, 2))
            assert shared_buffer(table.x) is not None


@pytest.mark.parametrize("store", ["fp16", "bf16", "int8", "fp8"])
def test_shared_rows_are_kept_as_a_table_keeps_them(store):
    x = torch.randn(9, 5)
    plain = dataeff.FeatureTable(x, store=store)
    for source in (x, x.clone):
        with dataeff.FeatureTable.shared(source, store=store) as table:
            assert (table.dtype, table.shape) == (x.dtype, x.shape)
            assert torch.equal(table[:], plain[:])
            assert shared_buffer(table._rows._memory.x) is not None
    half = x.half()  # small already
    with dataeff.FeatureTable.shared(half, store="fp16") as table:
        assert torch.equal(table[:], half) and table.x.dtype == torch.float16


def test_shared_takes_hot_rows():
    x = torch.arange(12.0).view(6, 2)
    hot = dataeff.HotRows(2, torch.arange(6.0))
    for store in (None, "int8"):
        with dataeff.FeatureTable.shared(x, store=store, hot=hot) as table:
            torch.testing.assert_close(table[:], x, rtol=0, atol=0.05)
            table[torch.tensor([5])]
            assert table.stats().num_hot_rows == 3
        with pytest.raises(TypeError, match=r"hot=7 is no HotRows"):
            dataeff.FeatureTable.shared(x, store=store, hot=7)
    for wrong, error, words in [(x.int(), TypeError, "int32"), ([1.0], TypeError, "as_tensor")]:
        with pytest.raises(error, match=words):
            dataeff.FeatureTable.shared(lambda wrong=wrong: wrong, store="int8")


@pytest.mark.parametrize("store", [None, "int8", "fp8"])
def test_ranks_hold_rows_once(tmp_path, store, rank_context):
    """By what every rank has of the machine's memory once all have gathered all rows."""
    shape = (1 << 15, 1 << 10)
    nbytes = (64 if store is None else 32) << 20
    answers, barrier = rank_context.Queue(), rank_context.Barrier(3, timeout=100)
    ranks = [
        rank_context.Process(
            daemon=True,
            target=processes.small_rows_of_rank,
            args=(rank, tmp_path / "store", barrier, answers, shape, store),
        )
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    found = sorted((answers.get(timeout=100) for _ in ranks), key=lambda answer: answer[0])
    for rank in ranks:
        rank.join(timeout=100)
    assert [made for _, made, *_ in found] == [[0], [], []]
    for _, _, dtype, rows, shared, grown, written in found:
        assert dtype == torch.float16  # of what the first rank made, which the others never saw
        torch.testing.assert_close(
            torch.tensor(rows), torch.tensor([3.0, 32767 % 97]), rtol=0.07, atol=0
        )
        assert written == pytest.approx(55, rel=0.07)
        assert shared == pytest.approx(nbytes / 3, abs=1 << 20)
        assert grown < 12 << 20, found  # a copy would be 32 MiB or more
    assert sum(shared for *_, shared, _, _ in found) == pytest.approx(nbytes, abs=2 << 20)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("store", [None, "int8"])
def test_a_feature_loader_in_another_process_reads_shared_rows(method, store):
    x = torch.arange(14.0).view(7, 2)
    context = multiprocessing.get_context(method)
    with dataeff.FeatureTable.shared(x, store=store) as table:
        here = [rows.tolist() for _, rows in dataeff.FeatureLoader(torch.arange(7).split(3), table)]
        answers = context.Queue()
        child = context.Process(target=processes.load_in_child, args=(table, answers), daemon=True)
        child.start()
        assert answers.get(timeout=60) == here
        child.join()
        assert child.exitcode == 0
        assert table[0].tolist() == pytest.approx([96, 96])  # the memory is one


def saved(table):
    file = io.BytesIO()
    torch.save(table, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("save", [pickle.dumps, copy.deepcopy, saved])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"store": "fp8"}),
        (torch.float32, {"store": "fp8", "hot": dataeff.HotRows(2)}),
        (torch.float8_e5m2, {}),
        (torch.uint16, {}),
        (torch.uint64, {"sort": True}),
    ],
)
def test_tables_of_every_dtype_come_back(save, dtype, options):
    x = torch.arange(24).view(6, 4).to(dtype)
    table = dataeff.FeatureTable(x, **options)
    again = save(table)
    again = pickle.loads(again) if isinstance(again, bytes) else again
    assert again.dtype == dtype
    assert torch.equal(again[:].view(torch.uint8), table[:].view(torch.uint8))


def test_pickle_alone_copies():
    table = dataeff.FeatureTable.shared(torch.zeros(3, 2))
    copy = pickle.loads(pickle.dumps(table))
    table.x.fill_(5)
    assert copy[1].tolist() == [0, 0]


def sources(x, folder):
    """One of everything that has rows in host memory or on disk, by name."""
    np.save(folder / "rows.npy", x.numpy())
    score = torch.arange(float(len(x)))
    return {
        "plain": dataeff.FeatureTable(x.clone()),
        "strided": dataeff.FeatureTable(torch.cat([x, x], 1)[:, : x.shape[1]]),
        "fp16": dataeff.FeatureTable(x, store="fp16"),
        "int8": dataeff.FeatureTable(x, store="int8", hot=dataeff.HotRows(3, score)),
        "fp8": dataeff.FeatureTable(x, store="fp8"),
        "hot": dataeff.FeatureTable(x.clone(), hot=dataeff.HotRows(3, policy="adaptive")),
        "disk": dataeff.FeatureTable.open(folder / "rows.npy"),
        "unified": dataeff.unified(x.clone()),
        "embedding": processes.Embedded(dataeff.HostEmbedding.from_pretrained(x.clone())),
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_data_loaders_workers_read_and_write_the_same_memory(method, tmp_path):
    x = torch.arange(24.0).view(12, 2) % 8
    found = sources(x, tmp_path)
    if method == "fork":  # a forked worker would have copies of the pages it writes
        for source in found.values():
            share_all(source)
    loader = torch.utils.data.DataLoader(
        processes.Rows(found), batch_size=4, num_workers=1, multiprocessing_context=method
    )
    batches = list(loader)
    everything = torch.arange(12)
    written = (100.0 + everything)[:, None].expand(12, 2)
    for name, source in found.items():
        read = torch.cat([batch[name] for batch in batches])
        rtol, atol = {"int8": (0, 0.5), "fp8": (2**-4, 0)}.get(name, (0, 0))
        close = {"rtol": rtol, "atol": atol}
        torch.testing.assert_close(read, x, **close)
        now = source[everything].detach().as_subclass(torch.Tensor)
        torch.testing.assert_close(now, x if name == "disk" else written, **close)
    found["disk"].close()


def share_all(source):
    if isinstance(source, processes.Embedded):
        source.embedding.share_memory()
    elif isinstance(source, torch.Tensor):
        share_(source)
    elif source._rows.__class__.__name__ != "DiskRows":
        source.share_()


def test_what_travels_is_a_descriptor(tmp_path):
    x = torch.zeros(1 << 15, 8)  # 1 MiB
    for name, source in sources(x, tmp_path).items():
        sent = ForkingPickler.dumps(source)
        assert len(sent) < 4096, (name, len(sent))
        again = pickle.loads(sent)
        assert torch.equal(again[torch.tensor([5])], source[torch.tensor([5])])
        if name == "plain":
            assert shared_buffer(again.x) is shared_buffer(source.x) is not None
        if name == "int8":
            scores = [table._rows._hot.score for table in (again, source)]
            assert shared_buffer(scores[0]) is shared_buffer(scores[1]) is not None


def test_a_forked_child_prefetches_with_a_thread_of_its_own():
    context = multiprocessing.get_context("fork")
    with dataeff.FeatureTable(torch.arange(6.0).view(3, 2)) as table:
        table.prefetch(torch.tensor([0])).wait()  # the parent's thread, which no child has
        answers = context.Queue()
        child = context.Process(
            target=processes.prefetch_in_child, args=(table, answers), daemon=True
        )
        child.start()
        assert answers.get(timeout=60) == [[2, 3]]
        child.join()
        assert child.exitcode == 0
        assert table.stats().num_gathers == 1


def test_a_forked_child_is_told_that_what_it_waits_for_is_the_parent_s():
    """It waited forever: for a prefetch, and where it went on with a loop of the parent's."""
    go, index = threading.Event(), torch.tensor([1])

    def blocked(item):
        if item:
            go.wait()
        return index

    def ask(run, answers):
        try:
            answers.put(run().tolist())
        except RuntimeError as error:
            answers.put(str(error))

    context, said = multiprocessing.get_context("fork"), []
    with ThreadPoolExecutor(1) as executor:
        there, missing = (prefetch_in_thread(executor, partial(blocked, i)) for i in range(2))
        loop = pipelined(range(3), blocked, num_threads=1, depth=2)
        next(loop)
        there.wait()
        for run in (there.wait, missing.wait, partial(next, loop)):
            answers = context.Queue()
            child = context.Process(target=ask, args=(run, answers), daemon=True)
            child.start()
            said.append(answers.get(timeout=60))
            child.join()
        go.set()
    assert said[0] == [1]
    assert all("in a thread that the child has not" in words for words in said[1:])
    assert list(loop) == [index] * 2
