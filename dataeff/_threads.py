"""The threads that loops of the core run on: torch's own, so that there is one team and not two."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (maps the libgomp looked for below)

from dataeff import _core


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
    """The address of `GOMP_parallel` in the one libgomp that this process has mapped, if any."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return None
    mapped = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
    if len(mapped) != 1:  # none, or two and no way to tell which is torch's
        return None
    library = ctypes.CDLL(mapped.pop())
    return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
