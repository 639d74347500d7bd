"""A thread that does one thing after another, in the background."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor


def worker(name: str) -> ThreadPoolExecutor:
    """An executor whose one thread, called `name`, runs already.

    An interrupt that comes while a thread is started leaves an executor that does not know of it:
    the process would wait at its end for a thread that nobody tells to stop. Here it is told.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        executor.submit(bool)
    except BaseException:
        executor.shutdown(wait=False)
        raise
    return executor
