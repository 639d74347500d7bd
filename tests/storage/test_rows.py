"""The parts of the core's row reader: the plan of reads, and the cache."""

import os
import signal
import threading
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataeff import _core

PAGE = 4096


@pytest.fixture
def fds(tmp_path):
    opened = []
    for i in range(3):
        path = tmp_path / f"{i}.rows"
        path.touch()
        os.truncate(path, 1 << 22)
        opened.append(os.open(path, os.O_RDONLY))
    yield opened
    for fd in opened:
        os.close(fd)


def places(rows, row_nbytes, extent, offset, num_files):
    for row in rows:
        at = row // extent
        yield at % num_files, offset + (at // num_files * extent + row % extent) * row_nbytes


@given(
    rows=st.lists(st.integers(0, 499), min_size=1, max_size=80),
    row_nbytes=st.sampled_from([1, 7, 100, 353, 1024, 4096, 5000, 8192]),
    extent=st.sampled_from([1, 3, 64, 500]),
    num_files=st.integers(1, 3),
    offset=st.sampled_from([0, 80, 128]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_runs_cover_every_wanted_row_once_and_no_page_twice(
    fds, rows, row_nbytes, extent, num_files, offset
):
    limit = 64 << 10
    segment = (500, extent, offset, fds[:num_files])
    runs = _core.plan_runs([segment], row_nbytes, rows, limit)
    wanted = sorted(places(rows, row_nbytes, extent, offset, num_files))
    assert sum(count for *_, count in runs) == len(wanted)
    taken = iter(wanted)
    for file, begin, nbytes, count in runs:
        assert begin % PAGE == 0
        assert nbytes <= limit
        for _ in range(count):
            at_file, at = next(taken)
            assert at_file == file
            assert begin <= at and at + row_nbytes <= begin + nbytes
    for (file, begin, nbytes, _), (other, after, *_) in pairwise(runs):
        pages_end = -(-(begin + nbytes) // PAGE) * PAGE
        # A run that is full may end inside the page in which the next begins.
        assert file != other or after > pages_end + PAGE or after + PAGE >= pages_end
        assert (file, begin) < (other, after)


def test_dense_rows_are_read_in_few_long_reads(fds):
    runs = _core.plan_runs([(500, 500, 0, fds[:1])], 1024, list(range(500)), 64 << 10)
    assert [nbytes for _, _, nbytes, _ in runs] == [64 << 10] * 7 + [52 << 10]
    assert _core.plan_runs([(500, 500, 0, fds[:1])], 1024, [0, 9, 40], 64 << 10) == [
        (0, 0, 10 << 10, 2),  # one page between them: read through
        (0, 40 << 10, 1 << 10, 1),
    ]


def test_a_row_longer_than_a_run_is_its_own(fds):
    segment = (20, 20, 64, fds[:1])
    runs = _core.plan_runs([segment], 100_000, [3, 5], 64 << 10)
    assert [count for *_, count in runs] == [1, 1]


@pytest.mark.parametrize(
    ("segment", "words"),
    [
        ((500, 1, 0, []), "file"),
        ((500, 0, 0, [0]), "extent"),
        ((5 << 20, 5 << 20, 0, None), "its rows end at byte 5242880"),
    ],
)
def test_impossible_segments(fds, segment, words):
    segment = (*segment[:3], fds[:1] if segment[3] is None else segment[3])
    with pytest.raises(ValueError, match=words):
        _core.plan_runs([segment], 1, [], 4096)


class ModelS3Fifo:
    """The algorithm as published, in plain Python: one tenth small, ghosts as many as slots.

    A ghost that comes back leaves its place in the queue of ghosts to be forgotten in its turn.
    """

    def __init__(self, num_slots):
        self.num_slots, self.small_target = num_slots, max(num_slots // 10, 1)
        self.small, self.main, self.ghosts = deque(), deque(), deque()
        self.uses, self.remembered, self.num_ghosts = {}, {}, 0

    def find(self, row):
        if row not in self.uses:
            return False
        self.uses[row] = min(self.uses[row] + 1, 3)
        return True

    def insert(self, row):
        if row in self.uses:
            return
        while len(self.uses) == self.num_slots:
            if len(self.small) >= self.small_target or not self.main:
                old = self.small.popleft()
                if self.uses[old] > 1:
                    self.uses[old] = 0
                    self.main.append(old)
                    continue
                del self.uses[old]
                if len(self.ghosts) == self.num_slots:
                    ghost, number = self.ghosts.popleft()
                    if self.remembered.get(ghost) == number:
                        del self.remembered[ghost]
                self.num_ghosts += 1
                self.ghosts.append((old, self.num_ghosts))
                self.remembered[old] = self.num_ghosts
            else:
                old = self.main.popleft()
                if self.uses[old] > 0:
                    self.uses[old] -= 1
                    self.main.append(old)
                else:
                    del self.uses[old]
        was_here = self.remembered.pop(row, None) is not None
        (self.main if was_here else self.small).append(row)
        self.uses[row] = 0


def cache_of(num_slots, row_nbytes=8):
    for budget in range(num_slots * row_nbytes, 400 * (num_slots + 2), 8):
        cache = None
        try:
            cache = _core.RowCache(budget, row_nbytes, 1000)
        except ValueError:
            continue
        if cache.num_slots == num_slots:
            return cache
    raise AssertionError("no budget gives this many slots")


@given(num_slots=st.integers(2, 24), rows=st.lists(st.integers(0, 60), max_size=400))
@settings(deadline=None)
def test_the_cache_holds_what_it_is_told_and_finds_it(num_slots, rows):
    cache = cache_of(num_slots)
    held = {}
    for step, row in enumerate(rows):
        found = cache.find(row, 8)
        assert found == held.get(row) if row in cache else found is None
        if found is None:
            held[row] = step.to_bytes(8, "little")
            cache.insert(row, held[row])
            assert cache.find(row, 8) == held[row]
        assert len(cache) <= num_slots


@given(num_slots=st.integers(2, 60), seed=st.integers(0, 2**32), skew=st.floats(0.5, 4))
@settings(deadline=None)
def test_the_cache_evicts_as_the_model_does(num_slots, seed, skew):
    cache, model = cache_of(num_slots), ModelS3Fifo(num_slots)
    rows = (np.random.default_rng(seed).random(1500) ** skew * 4 * num_slots).astype(int)
    for row in rows.tolist():
        assert (cache.find(row, 8) is not None) == model.find(row)
        cache.insert(row, bytes(8))
        model.insert(row)


def test_a_scan_leaves_the_hot_rows_in_place():
    cache, hot = cache_of(100), range(50)
    for _ in range(4):
        for row in hot:
            if cache.find(row, 8) is None:
                cache.insert(row, bytes(8))
    for row in range(1000, 3000):
        cache.insert(row, bytes(8))
    assert all(row in cache for row in hot)


def test_a_cache_too_small_for_two_rows_says_what_it_takes():
    with pytest.raises(ValueError, match=r"1000 bytes does not hold two rows of 4096 bytes"):
        _core.RowCache(1000, 4096, 100)


def test_a_cache_takes_no_more_than_its_budget_or_its_table():
    assert _core.RowCache(1 << 20, 1024, 10**9).num_slots * 1024 < 1 << 20
    assert _core.RowCache(1 << 20, 1024, 5).num_slots == 5


def test_signals_are_heard_while_a_disk_hangs(fds):
    """A pipe in the place of the file: the read ends when the signal's handler has written."""
    begun = _core.FaultPlan()  # without a fault: it counts
    try:
        reader = _core.RowReader([(64, 64, 0, fds[:1])], 64, 8, 0, None, begun)
    except OSError as error:
        pytest.skip(str(error))
    answer, question = os.pipe()
    os.dup2(answer, fds[0])
    index, out, written = np.zeros(1, np.int64), np.empty(64, np.uint8), []
    ended, page = threading.Event(), bytes(range(64)) * 64

    def heard(number, frame):
        if not written:
            written.append("by the handler")
            os.write(question, page)

    def send():
        for _ in range(1000):
            if begun.num_reads:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            if ended.wait(0.02):
                return
        written.append("at last")
        os.write(question, page)

    before = signal.signal(signal.SIGUSR1, heard)
    sender = threading.Thread(target=send)
    try:
        sender.start()
        reader.gather(index.ctypes.data, 1, 8, out.ctypes.data, 1)
    finally:
        ended.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)
        for fd in (answer, question):
            os.close(fd)
    assert written == ["by the handler"] and bytes(out) == page[:64]
