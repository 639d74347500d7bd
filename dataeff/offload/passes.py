"""Which pass over the model a saved tensor belongs to, and how much of a pass may be in flight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dataeff.offload.report import Counters
from dataeff.offload.schedule import Orders, Tape


@dataclass(frozen=True)
class Budgets:
    """Bounds on memory, in bytes; None lets the cache choose.

    Attributes:
        in_flight: bytes waiting for their store to finish; more, and forward waits for the oldest.
        prefetch: bytes brought back, or being brought back, before backward has asked for them.
    """

    in_flight: int | None = None
    prefetch: int | None = None


def in_backward() -> bool:
    """Whether backward runs on this thread: what is saved now, it saves."""
    return torch._C._current_graph_task_id() != -1


class Passes:
    """The tapes of the passes under way, one per microbatch and per backward that saves.

    Args:
        counters: where departures from the predicted order are counted.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._orders = Orders()
        self._tapes: dict[tuple[int, int], Tape] = {}
        self._last: Tape | None = None
        self._newest: Tape | None = None  # of forward, while backward has read no other
        self.microbatch = 0

    def saving(self) -> Tape:
        """The tape of this pass: a new one when backward has begun to read the last.

        Packs inside a backward (a recomputing checkpoint, a double backward) have a tape of
        their own, so that they do not disturb the order of the pass around them.
        """
        task = torch._C._current_graph_task_id()
        key = (self.microbatch, task)
        tape = self._tapes.get(key)
        if tape is None or tape.started:
            self._tapes = {k: old for k, old in self._tapes.items() if k[1] in (-1, task)}
            if tape is not None:
                self._finish(tape, key)
            past = None if tape is None or task != -1 else tape.past
            tape = self._tapes[key] = Tape(self._orders, past)
        if task == -1:
            self._newest = tape
        return tape

    def asked(self, tape: Tape) -> None:
        """Backward is about to unpack something of `tape`."""
        if not tape.started:
            tape.at_once = tape is self._newest
        if tape is not self._newest:
            self._newest = None

    @property
    def current(self) -> Tape | None:
        """The tape of the pass under way, if anything of it was moved."""
        if not self._tapes:
            return None
        return self._tapes.get((self.microbatch, torch._C._current_graph_task_id()))

    def forward_of(self, microbatch: int) -> Tape | None:
        """The tape of the last forward of `microbatch`."""
        return self._tapes.get((microbatch, -1))

    def limit(self, budget: int | None, tape: Tape | None) -> int:
        """`budget`, or an eighth of a pass, but never less than twice its largest storage."""
        if budget is not None:
            return budget
        last = self._last
        limit = 0 if tape is None else max(tape.nbytes // 8, 2 * tape.largest)
        return limit if last is None else max(limit, last.nbytes // 8, 2 * last.largest)

    def _finish(self, tape: Tape, key: tuple[int, int]) -> None:
        tape.finish()
        self._counters.num_replans += tape.num_replans
        if key[1] == -1:
            self._last = tape
