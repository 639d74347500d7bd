"""Hot rows that follow the accesses: least-frequently-used with ageing, behind a clock's hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES_PER_MOVE = 8
MAX_MOVES = 4096


@dataclass(frozen=True)
class Move:
    """What one step changes: row `rows[i]` goes to slot `slots[i]`, which may hold it already."""

    slots: Tensor
    rows: Tensor


class AdaptivePlacement:
    """Which rows are hot, kept up to date by plain tensor operations of fixed sizes.

    Each step counts the accesses of one index, then looks at m slots, the next ones of a hand that
    goes round them (CLOCK), and at the m most accessed cold rows of a sample of the index. The best
    candidate is set against the least accessed of these slots, the second best against the next,
    and so on; a row moves in when its count is larger. Counts are halved once per
    max(10 n, num_rows) accesses, so that what was hot long ago makes room. m is n / 16, at least 1
    and at most 4096: a complete change of taste takes 16 steps and more.

    Nothing here reads a value back: on CUDA every operation is queued, and the host does not wait.
    All rows of a step have the same count for the same row, and ties go by position, so a run
    repeats exactly.

    Args:
        num_rows: rows of the table.
        first: the rows that are hot at the start, [n], distinct.
        device: where the state is: 8 bytes a row of the table, 8 bytes a slot.

    Attributes:
        slots: [num_rows], int32, each row's slot or -1.
        held: [n], int64, each slot's row.
        counts: [num_rows], int32, accesses, ageing.
        num_moved: 0-dimensional, int64: rows moved in so far.
    """

    def __init__(self, num_rows: int, first: Tensor, device: torch.device) -> None:
        self.num_rows = num_rows
        self.held = first.to(device, torch.int64)
        self.slots = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        order = torch.arange(len(first), dtype=torch.int32, device=device)
        self.slots.index_copy_(0, self.held, order)
        self.counts = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.num_moved = torch.zeros((), dtype=torch.int64, device=device)
        self.moves_per_step = min(max(len(first) // 16, 1), MAX_MOVES, len(first))
        self._hand = 0
        self._seen = 0

    def propose(self, index: Tensor) -> Move:
        """Counts the accesses of an index and says which rows should move in; moves none yet.

        Args:
            index: any shape, not empty, int32 or int64; values out of range do not count.
        """
        ids, good = self._row_numbers(index)
        self.counts.scatter_add_(0, ids, good.to(torch.int32))
        self._age(ids.numel())
        num_moves = min(self.moves_per_step, ids.numel())
        window = (torch.arange(num_moves, device=ids.device) + self._hand) % self.held.numel()
        self._hand = (self._hand + num_moves) % self.held.numel()
        step = max(ids.numel() // (CANDIDATES_PER_MOVE * num_moves), 1)
        start = self._seen % step  # another sample each time
        rows, wanted = self._best_cold(ids[start::step], good[start::step], num_moves)
        slots, kept = self._least_used(window[: len(rows)])
        take = wanted > kept
        self.num_moved += take.sum()
        return Move(slots, torch.where(take, rows, self.held[slots]))

    def commit(self, move: Move) -> None:
        """Makes the places those of the move, once the rows are where it says."""
        self.slots.index_fill_(0, self.held[move.slots], -1)
        self.slots.index_copy_(0, move.rows, move.slots.to(torch.int32))
        self.held.index_copy_(0, move.slots, move.rows)

    def _row_numbers(self, index: Tensor) -> tuple[Tensor, Tensor]:
        ids = index.reshape(-1).to(torch.int64)
        good = (ids >= -self.num_rows) & (ids < self.num_rows)
        return torch.where(good, ids.remainder(self.num_rows), 0), good

    def _age(self, num_accesses: int) -> None:
        self._seen += num_accesses
        period = max(10 * self.held.numel(), self.num_rows)
        if self._seen >= period:
            self.counts.bitwise_right_shift_(1)
            self._seen %= period

    def _best_cold(self, ids: Tensor, good: Tensor, num_moves: int) -> tuple[Tensor, Tensor]:
        ids, order = ids.sort(stable=True)
        again = torch.zeros_like(good)
        again[1:] = ids[1:] == ids[:-1]
        # A row with a place, or met before in this sample, must never win one.
        out = again | ~good[order] | (self.slots[ids] >= 0)
        counts = torch.where(out, -1, self.counts[ids])
        wanted, which = counts.topk(min(num_moves, len(ids)))
        return ids[which], wanted

    def _least_used(self, window: Tensor) -> tuple[Tensor, Tensor]:
        kept, order = self.counts[self.held[window]].sort(stable=True)
        return window[order], kept
