"""A table in memory or on disk under concurrent gathers, prefetches, writes and closes.

What it should hold is a plain tensor.
"""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from dataeff import FeatureTable, HotRows
from dataeff.storage import FaultPlan

NUM_ROWS, WIDTH = 300, 5
KINDS = {
    "plain": {},
    "strided": {},
    "small": {"store": "fp16"},
    "hot": {"hot": HotRows(20, torch.arange(300))},
    "adaptive": {"hot": HotRows(20, policy="adaptive", every=1)},
    "small and adaptive": {"store": "fp16", "hot": HotRows(20, policy="adaptive", every=2)},
}
# Suffix and options; a cache of 1000 bytes holds a few of the 300 rows. Every fifth read is slow.
DISK_KINDS = {
    "npy": (".npy", {}),
    "npy without a cache": (".npy", {"cache_bytes": 0, "queue_depth": 1}),
    "slow disk": (".npy", {"engine": "threads", "cache_bytes": 1000}),
}
if find_spec("safetensors") is not None:
    DISK_KINDS["safetensors with a small cache"] = (".safetensors", {"cache_bytes": 1000})
INDEX = st.lists(st.integers(-NUM_ROWS, NUM_ROWS - 1), max_size=40).map(
    lambda ids: torch.tensor(ids, dtype=torch.int64)
)
VALUES = st.integers(0, 1000)


class TableMachine(RuleBasedStateMachine):
    """Writes happen between gathers; prefetches and other threads' gathers run beside all else."""

    prefetches = Bundle("prefetches")
    gathers = Bundle("gathers")

    @initialize(kind=st.sampled_from([*KINDS, *DISK_KINDS]))
    def open(self, kind: str) -> None:
        self.executor = ThreadPoolExecutor(3)
        self.folder = tempfile.TemporaryDirectory()
        self._make(kind)

    def _make(self, kind: str) -> None:
        # Numbers that float16 holds, too.
        whole = (torch.arange(NUM_ROWS * WIDTH * 2.0) % 2039).view(NUM_ROWS, -1)
        self.x = whole[:, :WIDTH] if kind == "strided" else whole[:, :WIDTH].contiguous()
        self.model = self.x.clone()
        self.on_disk = kind in DISK_KINDS
        self.in_place = "store" not in KINDS.get(kind, {})
        self.table = self._open_file(kind) if self.on_disk else FeatureTable(self.x, **KINDS[kind])
        self.closed = False

    def _open_file(self, kind: str) -> FeatureTable:
        suffix, options = DISK_KINDS[kind]
        path = Path(self.folder.name) / f"x{suffix}"
        if suffix == ".npy":
            np.save(path, self.x.numpy())
        else:
            from safetensors.torch import save_file

            save_file({"x": self.x}, path)
        slow = FaultPlan().add("read", delay_s=0.003, every=5) if kind == "slow disk" else None
        return FeatureTable.open(path, faults=slow, **options)

    @precondition(lambda self: not self.closed)
    @rule(index=INDEX, unique=st.booleans())
    def gather(self, index: torch.Tensor, unique: bool) -> None:
        out = torch.empty(len(index), WIDTH)
        self.table.gather(index, out=out, unique=unique)
        assert torch.equal(out, self.model[index])
        assert torch.equal(self.table[index], self.model[index])

    @precondition(lambda self: not self.closed)
    @rule(target=prefetches, index=INDEX, unique=st.booleans())
    def prefetch(self, index: torch.Tensor, unique: bool) -> tuple:
        return self.table, self.table.prefetch(index, unique=unique), self.model[index]

    @precondition(lambda self: not self.closed)
    @rule(target=gathers, index=INDEX)
    def gather_in_a_thread(self, index: torch.Tensor) -> tuple:
        table = self.table
        return table, self.executor.submit(lambda: table[index]), self.model[index]

    @rule(pending=consumes(prefetches))
    def wait(self, pending: tuple) -> None:
        table, prefetch, before = pending
        try:
            rows = prefetch.wait()
        except RuntimeError as error:
            assert "closed" in str(error)
            assert self.closed or table is not self.table
            return
        assert_old_or_written(rows, before)

    @rule(pending=consumes(gathers))
    def join(self, pending: tuple) -> None:
        table, future, before = pending
        try:
            rows = future.result(timeout=60)
        except RuntimeError as error:
            assert "closed" in str(error)
            assert self.closed or table is not self.table
            return
        assert_old_or_written(rows, before)

    @precondition(lambda self: not self.closed and self.on_disk)
    @rule(index=INDEX)
    def write_to_what_is_read_only(self, index: torch.Tensor) -> None:
        with pytest.raises(TypeError, match="on disk and read-only"):
            self.table.scatter_(index, self.model[index] + 1)
        assert torch.equal(self.table[:], self.x)

    @precondition(lambda self: not self.closed and self.on_disk)
    @rule()
    def count(self) -> None:
        before = self.table.stats()
        self.table[:]
        after = self.table.stats()
        assert after.num_rows >= before.num_rows + NUM_ROWS  # other threads may have gathered too

    @precondition(lambda self: not self.closed and not self.on_disk)
    @rule(index=INDEX, value=VALUES)
    def write(self, index: torch.Tensor, value: int) -> None:
        # What is written is negative and what was there at first is not: readers can tell.
        rows = torch.full((len(index), WIDTH), -1.0 - value)
        self.table.scatter_(index, rows)
        self.model[index] = rows
        assert torch.equal(self.table[:], self.model)
        if self.in_place:
            assert torch.equal(self.x, self.model)

    @precondition(lambda self: not self.closed)
    @rule(wrong=st.sampled_from([NUM_ROWS, -NUM_ROWS - 1, 2**40]))
    def ask_for_a_row_that_is_not_there(self, wrong: int) -> None:
        with pytest.raises(IndexError, match=str(wrong)):
            self.table[torch.tensor([0, wrong])]
        with pytest.raises(IndexError, match=str(wrong)):
            self.table.prefetch(torch.tensor([wrong])).wait()

    @rule(again=st.booleans(), kind=st.sampled_from([*KINDS, *DISK_KINDS]))
    def close(self, again: bool, kind: str) -> None:
        self.table.close()
        self.table.close()
        self.closed = True
        with pytest.raises(RuntimeError, match="closed"):
            self.table[torch.tensor([0])]
        if again:
            self._make(kind)

    @invariant()
    def no_thread_is_left_by_a_closed_table(self) -> None:
        if getattr(self, "closed", False):
            assert self.table._prefetcher._executor is None

    def teardown(self) -> None:
        if hasattr(self, "executor"):
            self.executor.shutdown(wait=True)
            self.table.close()
            self.folder.cleanup()


def assert_old_or_written(rows: torch.Tensor, before: torch.Tensor) -> None:
    """A gather beside a write may see each element before or after it, and nothing else."""
    assert ((rows == before) | (rows < 0)).all()


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_many_threads_at_once_while_the_table_closes() -> None:
    x = torch.arange(200_000.0).view(-1, 4)
    for _ in range(20):
        table = FeatureTable(x)
        wrong: list[str] = []
        start = threading.Barrier(5)

        def read(
            table: FeatureTable = table,
            wrong: list[str] = wrong,
            start: threading.Barrier = start,
        ) -> None:
            start.wait()
            index = torch.randint(len(x), (5000,))
            try:
                while True:
                    if not torch.equal(table.prefetch(index).wait(), x[index]):
                        wrong.append("rows")
            except RuntimeError as error:
                if "closed" not in str(error):
                    wrong.append(str(error))

        readers = [threading.Thread(target=read) for _ in range(4)]
        for reader in readers:
            reader.start()
        start.wait()
        table.close()
        for reader in readers:
            reader.join(timeout=60)
            assert not reader.is_alive()
        assert not wrong
