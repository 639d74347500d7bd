"""Opening an asynchronous file engine, and closing it before the interpreter goes."""

from __future__ import annotations

import atexit
import errno
import os
import weakref

from dataeff import _core
from dataeff._integers import checked_int
from dataeff.storage.cufile import cufile_library

_open: weakref.WeakSet[_core.Engine] = weakref.WeakSet()


KINDS = ("threads", "io_uring", "cufile")
_MOST = 2**31 - 1  # that the core's int takes; each engine has a bound of its own


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
            that keeps many requests with the kernel; `cufile`: between files and GPU memory,
            without a stop in host memory. `dataeff.storage.choose_engine` measures which is faster.
        num_threads: of `threads` and `cufile`: how many 1 MiB pieces are on their way at one time.
        queue_depth: of `io_uring`: the same.
        faults: faults to inject, for tests.

    Raises:
        TypeError: a number of threads or requests is no integer.
        ValueError: an unknown kind, or no sensible number of threads or requests.
        OSError: `io_uring` or `cufile` was asked for and is missing or forbidden; the text says
            which.
    """
    num_threads = checked_int("num_threads", num_threads, most=_MOST)
    queue_depth = checked_int("queue_depth", queue_depth, most=_MOST)
    if kind == "threads":
        engine = _core.make_threads_engine(num_threads, faults)
    elif kind == "io_uring":
        try:
            engine = _core.make_uring_engine(queue_depth, faults)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise OSError(
                error.errno,
                f"{error.strerror}: {os.strerror(error.errno)}; a ring takes two (close some, or "
                "raise the limit: ulimit -n; the engine 'threads' takes none)",
            ) from error
    elif kind == "cufile":
        if faults is not None:
            raise ValueError("faults cannot be injected into cuFile: they would touch GPU memory")
        engine = _core.make_cufile_engine(cufile_library() or "libcufile.so.0", num_threads)
    else:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
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
