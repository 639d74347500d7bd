"""Rows that also live in GPU memory: which ones, and where they are found."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import torch
from torch import Tensor

from dataeff._integers import checked_int
from dataeff.features.adaptive import AdaptivePlacement
from dataeff.features.bits import as_bits
from dataeff.features.gather_stored import Source, gather_stored
from dataeff.features.hot_cost import check_score, suggest_hot_rows
from dataeff.memory import SharedTensor, share_

Policy = Literal["static", "adaptive"]


class HotRows:
    """The rows of a table that GPUs keep in their own memory: `FeatureTable(x, hot=HotRows(...))`.

    One kernel reads hot rows from GPU memory and the others from host memory, by one index. A table
    of row numbers says where a row is (4 bytes a row of GPU memory), or, when neither a score nor a
    policy is given, the first `n` rows are the hot ones, for tables reordered by hotness.

    `policy="static"` keeps the `n` rows of the highest score. `policy="adaptive"` begins with them
    (without a score, with the first `n`) and then follows the accesses; see `AdaptivePlacement`.
    Neither makes the host wait for the device.

    On a CPU every row is in host memory: nothing is copied, and hits are still counted, as they
    would be on a GPU, at the price of one look-up a row.

    Source: Data Tiering (KDD 2022), section 3.

    Args:
        n: hot rows; more than the table has is all of them.
        score: [num_rows], how much each row is asked for, any real dtype; see
            `dataeff.features.hotness`.
        policy: `"static"` or `"adaptive"`.
        every: for the adaptive policy: follow every `every`-th gather.

    Raises:
        TypeError: `score` is complex or no tensor, `n` or `every` no integer.
        ValueError: `n` is negative, `score` is not one-dimensional or holds a NaN, the policy is
            unknown, or `every` is not positive.
    """

    suggest = staticmethod(suggest_hot_rows)

    def __init__(
        self, n: int, score: Tensor | None = None, *, policy: Policy = "static", every: int = 4
    ) -> None:
        n, every = checked_int("n", n, least=0), checked_int("every", every, least=1)
        if policy not in ("static", "adaptive"):
            raise ValueError(f"policy={policy!r} is not one of 'static', 'adaptive'")
        if score is not None:
            check_score(score)
        self.n, self.score, self.policy, self.every = n, score, policy, every

    def __repr__(self) -> str:
        score = "" if self.score is None else ", score"
        return f"HotRows({self.n}{score}, policy={self.policy!r})"

    def chosen(self, num_rows: int) -> Tensor | None:
        """The rows to begin with, [min(n, num_rows)], int64, hottest first; None: the first ones.

        Raises:
            ValueError: the score is of another number of rows.
        """
        if self.score is None:
            return None
        if len(self.score) != num_rows:
            raise ValueError(
                f"score has {len(self.score)} values but the table has {num_rows} rows"
            )
        # Stable, so that the choice among equals is the same everywhere.
        order = self.score.detach().cpu().argsort(descending=True, stable=True)
        return order[: self.n]


def _receive(score: SharedTensor | None, n: int, policy: Policy, every: int) -> HotRows:
    return HotRows(n, None if score is None else score.tensor(), policy=policy, every=every)


def _send(hot: HotRows) -> tuple[Callable[..., HotRows], tuple[Any, ...]]:
    score = None
    if hot.score is not None:
        hot.score = share_(hot.score.detach().cpu())
        score = SharedTensor(hot.score)
    return _receive, (score, hot.n, hot.policy, hot.every)


# Between processes a score travels as a descriptor, as the rows do.
ForkingPickler.register(HotRows, _send)


class HotTier:
    """The hot rows of one device: their memory, their places, and what was found in them.

    Args:
        hot: which rows.
        source: the table's own rows; the scales on the device.
        device: where the rows are to be; on a CPU there are places only.
    """

    def __init__(self, hot: HotRows, source: Source, device: torch.device) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._every, self._num_gathers = hot.every, 0
        num_rows = source.table.shape[0]
        self.num_hot = min(hot.n, num_rows)
        chosen = hot.chosen(num_rows)
        self.placement: AdaptivePlacement | None = None
        self.slots: Tensor | None = None
        if hot.policy == "adaptive":
            first = torch.arange(self.num_hot, device="cpu") if chosen is None else chosen
            self.placement = AdaptivePlacement(num_rows, first, device)
            self.slots = self.placement.slots
        elif chosen is not None:
            self.slots = torch.full((num_rows,), -1, dtype=torch.int32, device="cpu")
            self.slots[chosen] = torch.arange(self.num_hot, dtype=torch.int32, device="cpu")
            self.slots = self.slots.to(device)
        self.hits = torch.zeros(1, dtype=torch.int64, device=device)
        self.rows: Tensor | None = None
        # Of the last gather where hot rows move; in a captured graph, of its last replay.
        self._gathered: torch.cuda.Event | None = None
        if device.type == "cuda":
            ids = torch.arange(self.num_hot, device="cpu") if chosen is None else chosen
            with torch.cuda.device(device):
                codes = Source(source.table)  # as they are kept: scales have no part in it
                self.rows = gather_stored(codes, ids.to(device), source.table.dtype)
                # Once: the next gather may be on another stream, which knows nothing of this one.
                torch.cuda.current_stream(device).synchronize()
                if self.placement is not None:
                    self._gathered = torch.cuda.Event(external=True)
                    self._gathered.record(torch.cuda.current_stream(device))

    def source(self) -> Source:
        """Where a gather on the device finds the rows."""
        base = self._source
        if self.rows is None or not self.num_hot:
            return base
        return Source(base.table, base.scales, self.rows, self.slots, self.hits)

    def moved(self, table: Tensor) -> None:
        """Reads the rows in this tensor from now on, which are the same."""
        self._source = self._source._replace(table=table)

    def before(self, index: Tensor) -> None:
        """Orders a gather on the current stream behind the last change of the hot rows.

        Captured, it is each replay that waits: for the last gather, or replay, before it.
        """
        if self._gathered is not None:
            torch.cuda.current_stream(index.device).wait_event(self._gathered)

    def after(self, index: Tensor) -> int:
        """Counts hits where no kernel does, and follows the accesses; returns rows fetched."""
        with self._lock:
            if self.rows is None:
                self.hits += self._found(index)
            try:  # an earlier wrong index may be raised here, when part of it is under way
                return self._follow_in_turn(index)
            finally:
                if self._gathered is not None:
                    self._gathered.record(torch.cuda.current_stream(index.device))

    def _follow_in_turn(self, index: Tensor) -> int:
        if self.placement is None or not self.num_hot or not index.numel() or _capturing(index):
            return 0
        self._num_gathers += 1
        return self._follow(index) if self._num_gathers % self._every == 0 else 0

    def _found(self, index: Tensor) -> Tensor:
        num_rows = self._source.table.shape[0]
        ids = index.reshape(-1)
        ids = torch.where(ids < 0, ids + num_rows, ids)
        hot = ids < self.num_hot if self.slots is None else self.slots[ids] >= 0
        return hot.sum()

    def _follow(self, index: Tensor) -> int:
        assert self.placement is not None
        move = self.placement.propose(index)
        if self.rows is not None:
            # Rows that stay are read from their own place: no traffic on the bus.
            source = Source(self._source.table, None, self.rows, self.slots)
            fetched = gather_stored(source, move.rows, self.rows.dtype)
            as_bits(self.rows).index_copy_(0, move.slots, as_bits(fetched))
        self.placement.commit(move)
        return move.slots.numel()

    def num_moved(self) -> int:
        """Rows that the adaptive policy has brought in so far; waits for the device."""
        return 0 if self.placement is None else int(self.placement.num_moved)

    def num_hits(self) -> int:
        """Rows found in the hot tier so far; waits for the device."""
        return int(self.hits)

    def copier(self, ids: Tensor) -> Callable[[], None]:
        """What copies rows of the table, [n], on the host, into their places once they are written.

        All memory that it needs is taken here, so that it does not fail between the two.
        """
        if self.rows is None or not self.num_hot:
            return lambda: None
        found = ids if self.slots is None else self.slots[ids.to(self.slots.device)].cpu().long()
        here = (found >= 0) & (found < self.num_hot)
        return copier(self._source.table, ids[here], self.rows, found[here].to(self.rows.device))


def copier(table: Tensor, ids: Tensor, copies: Tensor, places: Tensor) -> Callable[[], None]:
    """`copies[places] = table[ids]` for later, its memory on the device taken now.

    Args:
        table: [num_rows, ...], host memory.
        ids: [n], int64, on the host, none negative.
        copies: [num_copies, ...], on a device, its dtype the table's.
        places: [n], int64, on the device; rows of equal places are the same.
    """
    # As integers: torch indexes no tensor of float8 on a GPU, and writes none of uint16 anywhere.
    table, copies = as_bits(table), as_bits(copies)
    room = copies.new_empty((len(ids), *copies.shape[1:]))

    def copy() -> None:
        room.copy_(table[ids])
        copies.index_copy_(0, places, room)

    return copy


def _capturing(index: Tensor) -> bool:
    # Of an index on the CPU no question is put to CUDA: a forked child may not ask it.
    return index.is_cuda and torch.cuda.is_current_stream_capturing()
