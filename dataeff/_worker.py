"""A thread that does one thing after another, in the background."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

_kept: set[ThreadPoolExecutor] = set()


class _Kept(ThreadPoolExecutor):
    """Stays until it is shut down, whoever drops it."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        _kept.discard(self)


def worker(name: str, kept: bool = False) -> ThreadPoolExecutor:
    """An executor whose one thread, called `name`, runs already.

    An interrupt that comes while a thread is started leaves an executor that does not know of it:
    the process would wait at its end for a thread that nobody tells to stop. Here it is told.

    Args:
        name: of the thread.
        kept: until it is shut down. Otherwise it ends once nothing holds it, and where it is
            garbage, before the `__del__` of what held it: what that submits is never done.
    """
    executor = (_Kept if kept else ThreadPoolExecutor)(1, thread_name_prefix=name)
    try:
        executor.submit(bool)
    except BaseException:
        executor.shutdown(wait=False)
        raise
    if kept:
        _kept.add(executor)
    return executor
