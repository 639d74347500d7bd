"""Opening an asynchronous file engine, and closing it before the interpreter goes."""

from __future__ import annotations

import atexit
import weakref

from dataeff import _core

_open: weakref.WeakSet[_core.Engine] = weakref.WeakSet()


def open_engine(
    kind: str = "threads", *, num_threads: int = 4, faults: _core.FaultPlan | None = None
) -> _core.Engine:
    """Starts an engine that reads and writes files while the caller goes on.

    Args:
        kind: `threads`: blocking pread and pwrite on threads of the core.
        num_threads: how many transfers, or 1 MiB pieces of one, are on their way at one time.
        faults: faults to inject, for tests.

    Raises:
        ValueError: an unknown kind, or no sensible number of threads.
    """
    if kind != "threads":
        raise ValueError(f"kind={kind!r} is not one of 'threads'")
    engine = _core.make_threads_engine(num_threads, faults)
    _open.add(engine)
    return engine


@atexit.register
def _close_all() -> None:
    # The engines' threads know nothing of the interpreter: they would go on writing to memory that
    # it frees on its way out.
    for engine in list(_open):
        engine.close(cancel=True)
