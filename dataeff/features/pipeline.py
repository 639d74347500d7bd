"""An ordered pipeline of threads: results in the order of their tasks, so many of them ahead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from dataeff._threads import loop_threads, work_beside

Task = TypeVar("Task")
Result = TypeVar("Result")


class LateError(RuntimeError):
    """A result did not come in time."""


def pipelined(
    tasks: Iterable[Task],
    work: Callable[[Task], Result],
    *,
    num_threads: int,
    depth: int,
    begin: Callable[[int], object] | None = None,
    timeout_s: float | None = None,
) -> Generator[Result, None, None]:
    """Yields `work(task)` for each task, in order, up to `depth` of them computed ahead.

    Tasks are drawn by the consumer's thread, so what they take from random generators does not
    depend on timing. When the consumer stops early (a `break`, an error, a dropped iterator), tasks
    not begun are cancelled and those under way are waited for. An exception of `work`, or of
    drawing a task, is raised where the result would have been; in a forked child, which has none of
    the threads, RuntimeError.

    Args:
        tasks: what to do.
        work: does one; runs in the pool's threads, or in the caller's when `num_threads` is 0.
        num_threads: threads that work; they share torch's number for loops of the core, and
            operators of torch run on each of them alone (`work_beside`).
        depth: how many results may be under way or waiting, at least 1.
        begin: called with its number in each thread, before the first task and in none without.
        timeout_s: the longest wait for one result of the threads, or for all to have begun.

    Raises:
        LateError: one did not come within `timeout_s`; nobody waits for its thread then.
    """
    if num_threads == 0:
        for task in tasks:  # `map` would take a StopIteration of `work` for the end of the tasks
            yield work(task)
        return
    ahead: deque[Future[Result]] = deque()
    drawn = iter(tasks)
    error: Exception | None = None
    pid = os.getpid()
    executor = ThreadPoolExecutor(
        num_threads,
        thread_name_prefix="dataeff-loader",
        initializer=work_beside,
        initargs=(max(1, loop_threads() // num_threads),),
    )
    late = False
    try:
        if begin is not None:
            for begun in _begin_each(executor, num_threads, begin):
                result_in(pid, begun, timeout_s)
        while error is None:
            try:
                ahead.append(executor.submit(work, next(drawn)))
            except StopIteration:
                break
            except Exception as failed:  # raised below, in its result's place
                error = failed
            if len(ahead) >= depth:
                yield result_in(pid, ahead.popleft(), timeout_s)
        while ahead:
            yield result_in(pid, ahead.popleft(), timeout_s)
        if error is not None:
            raise error
    except LateError:
        late = True
        raise
    finally:
        executor.shutdown(wait=not late, cancel_futures=True)


def _begin_each(
    executor: ThreadPoolExecutor, num_threads: int, begin: Callable[[int], object]
) -> list[Future[object]]:
    """`begin(number)` in each thread of a new executor."""
    together = threading.Barrier(num_threads)  # none takes the turn of another

    def first(number: int) -> object:
        together.wait()
        return begin(number)

    try:
        return [executor.submit(first, number) for number in range(num_threads)]
    except BaseException:  # no further thread, or an interrupt: those that wait would do so forever
        together.abort()
        raise


def result_in(pid: int, future: Future[Result], timeout_s: float | None = None) -> Result:
    """`future.result()` in the process that began it.

    Raises:
        LateError: it is not there after `timeout_s`.
        RuntimeError: in a forked child, unless it was there before the fork: the thread that works
            on it is the parent's.
    """
    if os.getpid() != pid and not future.done():
        raise RuntimeError(
            "this was begun before the process forked, in a thread that the child has not: begin "
            "anew there"
        )
    if timeout_s is not None and not wait([future], timeout_s).done:
        raise LateError(f"nothing came from a thread within timeout={timeout_s:g} seconds")
    return future.result()
