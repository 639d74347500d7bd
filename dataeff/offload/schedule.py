"""What backward will ask for next.

One forward pass makes a `Tape`: the storages it saved, in order. Backward asks for them in nearly
the reverse order; the first backward over a tape is recorded, and a later tape with the same
sizes, or as many, is predicted to be read in the recorded order.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataeff.offload.saved import SavedStorage

_REMEMBERED_SHAPES = 16
_OTHER_LENGTH = 4


class Past:
    """A pass that is over.

    Args:
        sizes: of what it saved.
        order: their positions, as backward asked for them.
    """

    def __init__(self, sizes: list[int], order: list[int]) -> None:
        self.sizes = sizes
        self._upto = list(accumulate(sizes))
        # With each position, what backward had asked for when it had asked for that.
        self._asked = dict(zip(order, accumulate(sizes[i] for i in order), strict=True))

    def alike(self, position: int, nbytes: int) -> bool:
        """Whether a pass that saves `nbytes` at `position` may be one like this, of other inputs.

        Those of twice the length save two to four times as much.
        """
        if position >= len(self.sizes):
            return False
        before = self.sizes[position]
        return before <= _OTHER_LENGTH * nbytes and nbytes <= _OTHER_LENGTH * before

    def wanted_first(self, position: int, upto: int, nbytes: int) -> bool:
        """Whether what is at `position` is among the `nbytes` that backward asks for first.

        In a pass that has saved `upto` bytes up to there.
        """
        asked = self._asked.get(position)
        # What comes behind is taken to be as much larger, or smaller, as what came before.
        return asked is not None and asked * upto <= nbytes * self._upto[position]


class Tape:
    """The storages of one pass, and a cursor in the order they are expected to be asked for.

    Args:
        memory: the orders recorded.
        past: the same pass a step ago, if its backward followed it at once.
    """

    def __init__(self, memory: Orders, past: Past | None = None) -> None:
        self._memory = memory
        self._past = past
        self._soon = 0  # bytes of those that were said to be wanted soon
        self.at_once = False  # whether backward followed, with no other pass between
        self._saved: list[weakref.ref[SavedStorage]] = []
        self._sizes: list[int] = []
        self._asked: dict[int, None] = {}  # positions in the order of their first unpack
        self._expected: list[int] = []
        self._rank: dict[int, int] = {}
        self._cursor = 0
        self._ahead = 0  # of what is expected before this, all that is needed was fetched
        self.num_replans = 0
        self.nbytes = 0  # of all storages of the pass
        self.largest = 0  # bytes of the largest

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def started(self) -> bool:
        """Whether backward has begun to read this tape."""
        return bool(self._asked)

    def append(self, saved: SavedStorage) -> int:
        """Enters `saved` as the next of the pass; returns its position."""
        self._saved.append(weakref.ref(saved))
        self._sizes.append(saved.nbytes)
        self.nbytes += saved.nbytes
        self.largest = max(self.largest, saved.nbytes)
        self._expected = []
        return len(self._sizes) - 1

    def soon(self, nbytes: int) -> bool:
        """Whether the newest is among the `nbytes` that backward is expected to want first.

        That is so when this pass has gone like the one before it up to here, but for the length of
        its inputs.
        """
        past, position = self._past, len(self._sizes) - 1
        if past is None:
            return False
        newest = self._sizes[position]
        if not past.alike(position, newest):
            self._past = None
            return False
        soon = past.wanted_first(position, self.nbytes, nbytes) and self._soon + newest <= nbytes
        self._soon += newest * soon
        return soon

    @property
    def past(self) -> Past | None:
        """What the next such pass is to know of this one."""
        return Past(self._sizes, list(self._asked)) if self.at_once else None

    def ask(self, position: int) -> None:
        """Backward unpacks the storage at `position`: moves the cursor behind it."""
        if not self._expected:
            self.expect()
        if position in self._asked:
            return  # another view of it, or a retained graph: no news of the order
        self._asked[position] = None
        rank = self._rank.get(position)
        if rank != self._cursor:
            self.num_replans += 1
        if rank is not None:
            back = rank < self._cursor
            self._cursor = rank + 1
            self._ahead = self._cursor if back else max(self._ahead, self._cursor)

    def announce(self) -> bool:
        """Backward is about to read this tape; true when that is news."""
        if self._asked or self._expected or not self._sizes:
            return False
        self.expect()
        return True

    def upcoming(self) -> Iterator[SavedStorage]:
        """The storages expected next, nearest first, that are still needed and not `fetched`."""
        expected, near = self._expected, True
        for rank in range(self._ahead, len(expected)):
            saved = self._saved[expected[rank]]()
            if saved is not None and expected[rank] not in self._asked:
                near = False
                yield saved
            elif near:
                self._ahead = rank + 1

    def fetched(self, position: int) -> None:
        """The storages expected up to the one at `position` are in memory, or on their way."""
        self._ahead = max(self._ahead, self._rank[position] + 1)

    def given_up(self, position: int) -> None:
        """The storage at `position` is not in memory any more."""
        if position not in self._asked:
            self._ahead = min(self._ahead, max(self._rank.get(position, 0), self._cursor))

    def finish(self) -> None:
        """The pass is over: the order in which backward asked is expected of the next one."""
        if self._asked:
            self._memory.learn(self._sizes, list(self._asked))

    def expect(self) -> None:
        """Predicts the order of backward, once; what it has asked for already stays behind."""
        if self._expected:
            return
        self._expected = self._memory.recall(self._sizes)
        self._rank = {position: rank for rank, position in enumerate(self._expected)}
        self._cursor = self._ahead = 0


class Orders:
    """Recorded backward orders by the sizes of the pass; the oldest are forgotten."""

    def __init__(self) -> None:
        self._orders: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()

    def learn(self, sizes: list[int], order: list[int]) -> None:
        """Remembers that a pass with these sizes was read in this order."""
        key = tuple(sizes)
        self._orders[key] = order
        self._orders.move_to_end(key)
        if len(self._orders) > _REMEMBERED_SHAPES:
            self._orders.popitem(last=False)

    def recall(self, sizes: list[int]) -> list[int]:
        """The recorded order for such a pass; else the latest for one of as many storages.

        Inputs of another length save as many, of other sizes. Without any, the reverse of saving.
        """
        known = self._orders.get(tuple(sizes))
        if known is None:
            orders = reversed(self._orders.items())
            alike = (order for others, order in orders if len(others) == len(sizes))
            known = next(alike, None)
        return list(known) if known is not None else list(range(len(sizes) - 1, -1, -1))
