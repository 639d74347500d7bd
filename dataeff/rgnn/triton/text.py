"""Pieces of generated Triton: rows, loop bodies, and the axes of a row's elements.

Every value has a leading axis: ROWS for the center (or 1, for one row that is the same for all),
LANES = BLOCK * ROWS for inner rows, of which number b * ROWS + r is the b-th of center row r. Its
other axes are those of the row shape, padded to powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Rows of a domain in a variable, with the variable that masks them."""

    domain: str
    name: str
    mask: str
    level: str


@dataclass
class Block:
    """Lines of one loop body, and the values already computed in it."""

    indent: str
    lines: list[str] = field(default_factory=list)
    known: dict[tuple[int, str], str] = field(default_factory=dict)
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(self, line: str) -> None:
        """Append a line."""
        self.lines.append(self.indent + line)


def padded(shape: Shape) -> Shape:
    """A row shape with each axis rounded up to a power of two."""
    return tuple(1 << max(n - 1, 0).bit_length() for n in shape)


def padded_numel(shape: Shape) -> int:
    """Elements of a padded row."""
    return prod(padded(shape))


def lane(axis: int, shape: Shape) -> str:
    """Indices along one axis of a row shape, in a tensor with a leading row axis."""
    index = ", ".join(":" if a == axis else "None" for a in range(len(shape)))
    return f"tl.arange(0, {padded(shape)[axis]})[None, {index}]"


def trail(name: str, rank: int) -> str:
    """A per-row tensor beside tensors of `rank` more axes."""
    return name if rank == 0 else f"{name}[:, {', '.join(['None'] * rank)}]"


def extend(name: str, have: int, rank: int) -> str:
    """Add axes on the right: operands are aligned from the left."""
    if have == rank:
        return name
    index = ", ".join([*[":"] * (have + 1), *["None"] * (rank - have)])
    return f"({name})[{index}]"


def insert(name: str, batch: int, rank_out: int) -> str:
    """Add the input axis between the batch axes and the output axes."""
    index = ", ".join([*[":"] * (batch + 1), "None", *[":"] * rank_out])
    return f"({name})[{index}]"


def sum_axes(text: str, shape: Shape, axes: list[int]) -> str:
    """Sum a row's axes, whose padding counts as zero; they vanish."""
    masks = [f"({lane(a, shape)} < {shape[a]})" for a in axes if padded(shape)[a] != shape[a]]
    if masks:
        text = f"tl.where({' & '.join(masks)}, {text}, 0)"
    for axis in reversed(axes):
        text = f"tl.sum({text}, {axis + 1})"
    return text


def trivial_reshape(name: str, have: Shape, want: Shape) -> str:
    """Insert or drop axes of size 1; other reshapes are carried out on stored values."""
    if have == want:
        return name
    core = tuple(n for n in have if n != 1)
    assert core == tuple(n for n in want if n != 1), (have, want)
    text = f"({name})"
    for axis in reversed([a for a, n in enumerate(have) if n == 1]):
        text = f"tl.sum({text}, {axis + 1})"
    if len(core) == len(want):
        return text
    index = ", ".join([":", *["None" if n == 1 else ":" for n in want]])
    return f"{text}[{index}]"
