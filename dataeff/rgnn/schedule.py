"""What tuning chooses for a layer: passes and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dataeff.rgnn.triton.tiles import GemmSchedule


@dataclass(frozen=True)
class Choice:
    """What `rgnn.tune` chooses for one layer on graphs of about one size and shape.

    Attributes:
        disabled: optional passes that are left out.
        block_elements: elements of the widest value that a generated Triton traversal holds at a
            time: rows of a block times their padded width.
        parts_per_thread: pieces that a C++ traversal's rows are handed to each thread in.
        num_warps: warps of a generated Triton traversal whose blocks are wide, and half of those
            of its long rows.
        long_row: rows of a degree above this go to the kernel of long rows.
        hub: rows of a degree above this are cut into pieces of as many, for many programs.
        long_stages: blocks of a long row or a hub that are under way at a time. More than one go by
            way of shared memory.
        product: the Triton tile of all typed products, cut to each; the model's for each if None.
        gradient: the Triton tile of all weight gradients, likewise.
    """

    disabled: tuple[str, ...] = ()
    block_elements: int = 2048
    parts_per_thread: int = 16
    num_warps: int = 4
    long_row: int = 128
    hub: int = 4096
    long_stages: int = 1
    product: GemmSchedule | None = None
    gradient: GemmSchedule | None = None

    @property
    def sizes(self) -> tuple[Any, ...]:
        """All but the passes, in plain tuples that their text gives back."""
        tiles = (None if tile is None else tuple(tile) for tile in (self.product, self.gradient))
        numbers = self.block_elements, self.parts_per_thread, self.num_warps
        return (*numbers, self.long_row, self.hub, self.long_stages, *tiles)

    @classmethod
    def of(cls, disabled: Sequence[str], sizes: Sequence[Any]) -> Choice:
        """The choice of these passes and `sizes`, whose tuples may have become lists.

        Raises:
            ValueError, TypeError: sizes of other fields.
        """
        *numbers, product, gradient = sizes
        if len(numbers) != 6:
            raise ValueError(f"a choice has 8 sizes, got {len(sizes)}")
        tiles = (None if tile is None else GemmSchedule(*tile) for tile in (product, gradient))
        return cls(tuple(disabled), *numbers, *tiles)
