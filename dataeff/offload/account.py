"""The books of one tensor cache: its counters, its waits and transfers, its bytes per module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from dataeff.ledger import Ledger
from dataeff.offload.moments import Moment, Span, Times, span_of
from dataeff.offload.report import Counters, ModuleBytes

_MOST_PENDING = 256


class Account:
    """What the parts of a cache enter as they work; guarded by the cache's lock.

    Waits and transfers of a device are entered once it has reached them: `settle` looks.

    Args:
        ledger: where transfers and waits are drawn.
        moment: at which the compute of a device has done what it was given so far.
    """

    def __init__(self, ledger: Ledger, moment: Callable[[torch.device], Moment]) -> None:
        self.ledger = ledger
        self.counters = Counters()
        self.by_module: dict[str, ModuleBytes] = {}
        self._moment = moment
        self._pending: list[tuple[Times, Callable[[Span], None]]] = []

    def module(self, scope: str) -> ModuleBytes:
        """The bytes of the module named `scope`."""
        found = self.by_module.get(scope)
        if found is None:
            found = self.by_module[scope] = ModuleBytes()
        return found

    @contextmanager
    def exposed(self, name: str, device: torch.device) -> Iterator[None]:
        """Enters as a wait how long the compute of `device` stands still for its block."""
        begin = self._moment(device)
        try:
            yield
        finally:
            end = self._moment(device)
            self._enter(partial(span_of, begin, end), partial(self._waited, name))

    def moved(self, track: str, times: Times, nbytes: int) -> None:
        """Enters a transfer."""
        self._enter(times, partial(self._moved, track, nbytes))

    def settle(self) -> None:
        """Enters what a device has come to the end of."""
        self._pending = [pair for pair in self._pending if not _entered(*pair)]

    def _enter(self, times: Times, enter: Callable[[Span], None]) -> None:
        if _entered(times, enter):
            return
        self._pending.append((times, enter))
        if len(self._pending) % _MOST_PENDING == 0:
            self.settle()

    def _waited(self, name: str, span: Span) -> None:
        self.counters.exposed_wait_s += (span[1] - span[0]) / 1e9
        self.ledger.span("wait", name, *span)

    def _moved(self, track: str, nbytes: int, span: Span) -> None:
        self.counters.transfer_s += (span[1] - span[0]) / 1e9
        self.ledger.span(track, track, *span, nbytes)


def _entered(times: Times, enter: Callable[[Span], None]) -> bool:
    span = times()
    if span is None:
        return False
    enter(span)
    return True
