"""The threads that loops of the core run on: torch's own, so that there is one team and not two."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch  # which maps the libgomp looked for below

from dataeff import _core


def loop_threads() -> int:
    """Threads that a loop of the core runs on which the calling thread begins."""
    return _core.loop_threads_here() or torch.get_num_threads()


def work_beside(num_loop_threads: int) -> None:
    """Has the calling thread, one of a loader's, leave the training its threads.

    Loops of the core run on so many from now on. Operators of torch run on this thread alone, as
    in a worker process of torch's loader, unless it is a GPU that trains: for each thread that
    calls it libgomp keeps a team, and once there are more threads in its teams than cores, none of
    them spins any more, so that each operator of the training waits for its threads to be woken.
    Measured on an Intel Xeon, two cores, an epoch of GraphSAGE beside two such threads: 0.84 s;
    with teams of theirs 0.87 s, in which the cores stood idle for 160 ms instead of 20.
    """
    _core.set_loop_threads_here(num_loop_threads)
    if torch.cuda.is_available():
        return
    torch.get_num_threads()  # torch's own number is set at a thread's first question: not later
    if libgomp := _libgomp():
        libgomp.omp_set_num_threads(1)


@cache
def share_torch_threads() -> None:
    """Runs the core's loops on the OpenMP team that torch keeps, when the main thread calls them.

    Where torch brings another OpenMP than libgomp, and in a forked child, they run on the core's
    own pool. Measured on two cores, a gather of 20,000 rows of 256 bytes straight after a
    `torch.mm`: 1.3 ms on a pool of our own, whose
    threads get no core while libgomp's spin, and 0.8 ms on the team (`index_select`: 0.9 ms).
    """
    if address := torch_gomp_parallel():
        _core.use_openmp_team(address)


def torch_gomp_parallel() -> int | None:
    """The address of `GOMP_parallel` in torch's libgomp, if that is what it brings."""
    libgomp = _libgomp()
    return None if libgomp is None else ctypes.cast(libgomp.GOMP_parallel, ctypes.c_void_p).value


@cache
def _libgomp() -> ctypes.CDLL | None:
    """The one libgomp that this process has mapped, if any."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return None
    mapped = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    if len(mapped) != 1:  # none, or two and no way to tell which is torch's
        return None
    return ctypes.CDLL(mapped.pop())
