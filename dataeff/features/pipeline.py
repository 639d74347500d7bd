"""An ordered pipeline of threads: results in the order of their tasks, so many of them ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def pipelined(
    tasks: Iterable[Task], work: Callable[[Task], Result], *, num_threads: int, depth: int
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
        num_threads: threads that work.
        depth: how many results may be under way or waiting, at least 1.
    """
    if num_threads == 0:
        for task in tasks:  # `map` would take a StopIteration of `work` for the end of the tasks
            yield work(task)
        return
    ahead: deque[Future[Result]] = deque()
    drawn = iter(tasks)
    error: Exception | None = None
    pid = os.getpid()
    executor = ThreadPoolExecutor(num_threads, thread_name_prefix="dataeff-loader")
    try:
        while error is None:
            try:
                ahead.append(executor.submit(work, next(drawn)))
            except StopIteration:
                break
            except Exception as failed:  # raised below, in its result's place
                error = failed
            if len(ahead) >= depth:
                yield result_in(pid, ahead.popleft())
        while ahead:
            yield result_in(pid, ahead.popleft())
        if error is not None:
            raise error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def result_in(pid: int, future: Future[Result]) -> Result:
    """`future.result()` in the process that began it.

    Raises:
        RuntimeError: in a forked child, unless it was there before the fork: the thread that works
            on it is the parent's.
    """
    if os.getpid() != pid and not future.done():
        raise RuntimeError(
            "this was begun before the process forked, in a thread that the child has not: begin "
            "anew there"
        )
    return future.result()
