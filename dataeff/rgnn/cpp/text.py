"""Pieces of generated C++: rows, readable values, and loops over a row's elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Shape = tuple[int, ...]

# GCC unrolls loops of up to 16 before it vectorises them, and then, where each element is a choice,
# does not: maxima of rows of 16 took 19 ms so, and 1.9 ms as a loop. Shorter ones fill no vector.
_KEPT = range(4, 17)
_KEEP = '_Pragma("GCC unroll 1") '


@dataclass(frozen=True)
class Row:
    """A row of a domain, held in a C++ variable, known in the outer or the inner loop."""

    domain: str
    name: str
    level: str


@dataclass(frozen=True)
class Ref:
    """How to read a value: `at` maps one index per axis to an expression."""

    shape: Shape
    at: Callable[[list[str]], str]
    lazy: bool = False  # evaluated by each loop that reads it
    array: str = ""  # the array or pointer it is read from, row-major


@dataclass
class Block:
    """Lines of one loop body, and the values already computed in it."""

    indent: str
    lines: list[str] = field(default_factory=list)
    known: dict[tuple[int, str], Ref] = field(default_factory=dict)
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(self, line: str) -> None:
        """Append a line."""
        self.lines.append(self.indent + line)


def loops(shape: Shape, stem: str = "j") -> tuple[list[str], str, str]:
    """Index per axis, loop heads and closing text; axes of size 1 need no loop."""
    index, head = [], ""
    for axis, size in enumerate(shape):
        if size == 1:
            index.append("0")
            continue
        name = f"{stem}{axis}"
        index.append(name)
        head += _KEEP if size in _KEPT else ""
        head += f"for (int {name} = 0; {name} < {size}; ++{name}) "
    return index, head, ""


def flat(index: list[str], shape: Shape) -> str:
    """The row-major offset of an element."""
    terms = []
    stride = 1
    for name, size in zip(reversed(index), reversed(shape), strict=True):
        if size != 1 and name != "0":
            terms.append(name if stride == 1 else f"{name} * {stride}")
        stride *= size
    return " + ".join(reversed(terms)) or "0"


def array_ref(name: str, shape: Shape) -> Ref:
    """A value that is read from an array or through a pointer."""
    return Ref(shape, lambda index: f"{name}[{flat(index, shape)}]", array=name)


def broadcast(index: list[str], shape: Shape) -> list[str]:
    """The index of a left-aligned operand."""
    return ["0" if n == 1 else i for i, n in zip(index[: len(shape)], shape, strict=True)]
