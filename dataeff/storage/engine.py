"""Opening an asynchronous file engine, and closing it before the interpreter goes."""

from __future__ import annotations

import atexit
import weakref

from dataeff import _core

_open: weakref.WeakSet[_core.Engine] = weakref.WeakSet()


KINDS = ("threads", "io_uring")


def open_engine(
    kind: str = "threads",
    *,
    num_threads: int = 4,
    queue_depth: int = 32,
    faults: _core.FaultPlan | None = None,
) -> _core.Engine:
    """Starts an engine that reads and writes files while the caller goes on.

    Args:
        kind: `threads`: blocking pread and pwrite on threads of the core; `io_uring`: one thread
            that keeps many requests with the kernel; `auto`: io_uring where it is allowed, else
            threads (`engine.name` tells).
        num_threads: of `threads`: how many 1 MiB pieces are on their way at one time.
        queue_depth: of `io_uring`: the same.
        faults: faults to inject, for tests.

    Raises:
        ValueError: an unknown kind, or no sensible number of threads or requests.
        OSError: `io_uring` was asked for and is missing or forbidden; the text says which.
    """
    if kind == "auto":
        kind = "threads" if uring_refusal() else "io_uring"
    if kind == "threads":
        engine = _core.make_threads_engine(num_threads, faults)
    elif kind == "io_uring":
        engine = _core.make_uring_engine(queue_depth, faults)
    else:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}, auto")
    _open.add(engine)
    return engine


def uring_refusal() -> str | None:
    """Why this process cannot use io_uring, or None when it can."""
    try:
        _core.make_uring_engine(1, None).close()
    except OSError as error:
        return error.strerror
    return None


@atexit.register
def _close_all() -> None:
    # The engines' threads know nothing of the interpreter: they would go on writing to memory that
    # it frees on its way out.
    for engine in list(_open):
        engine.close(cancel=True)
