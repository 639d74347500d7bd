"""The first call of each provider under a time and a memory limit: a full run comes to an end.

What does not keep them is recorded as skipped, with the limit in the reason.
"""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from dataeff.bench.case import Step, Unavailable
from dataeff.bench.rgnn.workload import Workload, available_bytes

CALL_LIMIT_S = 10
SHORT_LIMIT_S = 5
OURS_LIMIT_S = 60  # of what the other figures are there for
COMPILING_LIMIT_S = 120  # of a first call in which kernels are compiled
MEMORY_SHARE = 0.8  # of what is free when a provider starts
STATM = Path("/proc/self/statm")
_NO_MEMORY = re.compile(r"allocate|out of memory|bad_alloc", re.IGNORECASE)


def within_limits(
    make: Callable[[Workload], Step], seconds: int = CALL_LIMIT_S, *, compiles: bool = False
) -> Callable[[Workload], Step]:
    """`make`, with its set-up within the memory limit, and its step's first call within both.

    `compiles`: a call before, in which kernels are compiled, belongs to the set-up.
    """

    def made(work: Workload) -> Step:
        on_host = not work.x.is_cuda
        with memory_limit(on_host=on_host):
            step = make(work)
            if compiles:
                _call_within(step.call, COMPILING_LIMIT_S)
        return replace(step, call=_Limited(step.call, seconds, on_host, compiles))

    return made


class _Limited:
    """A call whose first time is limited."""

    def __init__(
        self, call: Callable[[], Any], seconds: int, on_host: bool, compiles: bool
    ) -> None:
        self.call, self.seconds, self.on_host = call, seconds, on_host
        # A compiled function is another one inside a mode.
        self.mode = contextlib.nullcontext if compiles else _Interruptible
        self.first = True

    def __call__(self) -> Any:
        if not self.first:
            return self.call()
        self.first = False
        with memory_limit(on_host=self.on_host), self.mode():
            return _call_within(self.call, self.seconds)


class _Interruptible(TorchDispatchMode):
    """Brings every operator through Python, where a signal is heard: backward is one long call."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _call_within(call: Callable[[], Any], seconds: int) -> Any:
    reason = f"one step did not finish in {seconds} s"
    with time_limit(seconds, reason):
        start = time.perf_counter()
        result = call()
        if time.perf_counter() - start > seconds:  # no interrupt reaches a single long operator
            raise Unavailable(reason)
    return result


@contextmanager
def memory_limit(*, on_host: bool = True) -> Iterator[None]:
    """Raises Unavailable for an allocation in the block that memory does not hold.

    `on_host`: the address space is limited meanwhile; Linux would end the process instead. CUDA
    reserves more addresses than there is memory, and refuses by itself.
    """
    free = available_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if on_host and STATM.exists():
        pages = int(STATM.read_text().split()[0])
        wanted = pages * resource.getpagesize() + int(MEMORY_SHARE * free)
        wanted = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            line = str(error).strip().splitlines()[-1:] or ["no memory"]
            raise Unavailable(f"{line[0]}: {free / 1e9:.1f} GB were free") from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def time_limit(seconds: int, reason: str) -> Iterator[None]:
    """Raises Unavailable in the block after so long; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Unavailable(reason)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
