"""The books of one tensor cache: its counters, its waits and transfers, its bytes per module."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dataeff.ledger import Ledger
from dataeff.offload.report import Counters, ModuleBytes


class Account:
    """What the parts of a cache enter as they work; guarded by the cache's lock.

    Args:
        ledger: where transfers and waits are drawn.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.counters = Counters()
        self.by_module: dict[str, ModuleBytes] = {}

    def module(self, scope: str) -> ModuleBytes:
        """The bytes of the module named `scope`."""
        found = self.by_module.get(scope)
        if found is None:
            found = self.by_module[scope] = ModuleBytes()
        return found

    @contextmanager
    def exposed(self, name: str) -> Iterator[None]:
        """Enters the time of its block as a wait that compute stood still for."""
        start_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            end_ns = time.perf_counter_ns()
            self.counters.exposed_wait_s += (end_ns - start_ns) / 1e9
            self.ledger.span("wait", name, start_ns, end_ns)

    def moved(self, track: str, times_ns: tuple[int, int], nbytes: int) -> None:
        """Enters a transfer that has ended."""
        self.counters.transfer_s += (times_ns[1] - times_ns[0]) / 1e9
        self.ledger.span(track, track, *times_ns, nbytes)
