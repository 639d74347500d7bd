"""Rows on their way while the caller computes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dataeff._worker import worker
from dataeff.features.pipeline import result_in
from dataeff.features.rows import Rows
from dataeff.features.stats import Account
from dataeff.features.unique import gather_once
from dataeff.memory.cuda import captures, refuse_in_capture

T = TypeVar("T")


class Prefetch:
    """A gather under way; `wait()` gives its rows.

    On the CPU it runs in the table's thread, on CUDA on the table's own stream.
    """

    def __init__(
        self, finish: Callable[[], Tensor], abandon: Callable[[], object] = lambda: None
    ) -> None:
        self._finish, self._abandon = finish, abandon
        self._rows: Tensor | None = None

    def wait(self) -> Tensor:
        """Returns the rows, [*index.shape, *row shape], on the index's device.

        On CUDA the caller's current stream waits and the host does not. A second call returns the
        same tensor.

        Raises:
            IndexError: an index was out of range.
            RuntimeError: the table was closed before the gather began, or the process has forked
                since and this is the child.
        """
        if self._rows is None:
            self._rows = self._finish()
        return self._rows

    def __del__(self) -> None:
        if self._rows is None and not sys.is_finalizing():
            self._abandon()


def prefetch_in_thread(executor: ThreadPoolExecutor, gather: Callable[[], Tensor]) -> Prefetch:
    """Runs `gather` in a thread; exceptions come out of `wait()`."""
    future: Future[Tensor] = executor.submit(gather)
    pid = os.getpid()

    return Prefetch(lambda: _result(pid, future))


def _result(pid: int, future: Future[T]) -> T:
    try:
        return result_in(pid, future)
    except CancelledError:
        raise RuntimeError("the table was closed before this prefetch began") from None


def prefetch_in_thread_on_stream(
    executor: ThreadPoolExecutor,
    stream: torch.cuda.Stream,
    index: Tensor,
    gather: Callable[[], Tensor],
) -> Prefetch:
    """Runs `gather`, which keeps the host busy, in a thread whose copies to the GPU use `stream`.

    The rows' memory is of the current stream, as in `prefetch_on_stream`. Nobody can let that one
    wait for a copy that is yet to be queued, so the thread waits for it: rows that are dropped
    unseen are whole when their memory goes back.
    """
    refuse_in_capture("a thread that gathers", "prefetch before the capture")
    made_on = torch.cuda.current_stream(index.device)
    made = torch.cuda.Event()
    made.record(made_on)

    def run() -> Tensor:
        with torch.cuda.stream(stream):
            stream.wait_event(made)
            rows = gather()
            done = torch.cuda.Event()
            done.record(stream)
        done.synchronize()
        return rows

    future = executor.submit(run)
    pid = os.getpid()

    def finish() -> Tensor:
        rows = _result(pid, future)
        reader = torch.cuda.current_stream(index.device)
        if reader != made_on:
            rows.record_stream(reader)
        return rows

    return Prefetch(finish)


def prefetch_on_stream(
    stream: torch.cuda.Stream, index: Tensor, gather: Callable[[], Tensor]
) -> Prefetch:
    """Runs `gather` on `stream`, after what the current stream has queued (it may make the index).

    `gather` writes into memory that was allocated on the current stream: were it the side stream's,
    rows that a reader lets go could be taken for the next gather while kernels still read them.
    That memory goes back only behind the gather, which whoever waits, or abandons, sees to.
    """
    made_on = torch.cuda.current_stream(index.device)
    _leave_put_off()
    stream.wait_stream(made_on)
    done = torch.cuda.Event()
    try:
        with torch.cuda.stream(stream):
            try:
                rows = gather()
            finally:
                done.record(stream)
    except BaseException:  # raised, it may be, when the gather was queued already
        _leave(_Abandoned(made_on, done, (index, gather)))
        raise

    def finish() -> Tensor:
        # The index lives in this closure until the gather has been ordered before its reader.
        reader = torch.cuda.current_stream(index.device)
        reader.wait_event(done)
        if reader != made_on:  # which takes the rows' memory back, and knows nothing of the reader
            made_on.wait_event(done)
            rows.record_stream(reader)
        return rows

    def abandon() -> None:
        # Or whoever gets the memory of the index next would write into it before it is read.
        _leave(_Abandoned(made_on, done, (index, rows)))

    return Prefetch(finish, abandon)


class _Abandoned(NamedTuple):
    """A gather that nobody waits for, and what holds its memory, which is of `stream`."""

    stream: torch.cuda.Stream
    done: torch.cuda.Event
    memory: tuple[object, ...]


_put_off: list[_Abandoned] = []  # while their stream was captured: a graph cannot wait for them


def _leave(gather: _Abandoned) -> None:
    """Lets its memory go behind it, or keeps it until a capture has ended."""
    if captures(gather.stream):
        _put_off.append(gather)
    else:
        gather.stream.wait_event(gather.done)


def _leave_put_off() -> None:
    waiting = _put_off[:]
    del _put_off[: len(waiting)]
    for gather in waiting:
        _leave(gather)


class Prefetcher:
    """Begins the prefetches of one table: on a stream for each device, or in one thread."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def begin(self, rows: Rows, account: Account, index: Tensor, unique: bool) -> Prefetch:
        """Starts a gather; not for two threads at once, nor after `close`."""
        on_host, out = index.device.type == "cpu", None
        if not on_host:  # on the stream of whoever asks, in whose order it will be let go
            out = index.new_empty((*index.shape, *rows.shape[1:]), dtype=rows.dtype)
        unique = unique and index.numel() > 0
        fetch = partial(gather_once, rows) if unique else rows.gather
        gather = partial(fetch, index, out, account)
        if not on_host and rows.asynchronous and not unique:
            return prefetch_on_stream(self._stream(index), index, gather)
        if self._executor is None:
            self._executor = worker("dataeff-prefetch")
        if on_host:
            return prefetch_in_thread(self._executor, gather)
        return prefetch_in_thread_on_stream(self._executor, self._stream(index), index, gather)

    def _stream(self, index: Tensor) -> torch.cuda.Stream:
        if index.device not in self._streams:
            self._streams[index.device] = torch.cuda.Stream(index.device)
        return self._streams[index.device]

    def close(self) -> None:
        """Waits for what is under way in the thread, and cancels what has not begun."""
        executor, self._executor = self._executor, None
        self._streams.clear()
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)
