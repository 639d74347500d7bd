"""C++ that fetches what a loop reads through indices some iterations before it is read.

Rows that one center leads to are few and scattered, so neither the hardware's prefetcher nor the
processor's window reaches the next ones; their indices are known, though. An index that is itself
found through another one is fetched earlier still: a chain that had to be followed at once would
wait for memory at every link.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class _Place:
    """A row's number at iteration `u`, and through how many scattered reads it is found."""

    number: str
    depth: int


@dataclass
class Lookahead:
    """What one loop reads through indices.

    Args:
        counter: the variable that the loop counts.
        rows: places of rows that are known without an index, by variable.
    """

    counter: str
    places: dict[str, _Place] = field(default_factory=dict)
    wanted: dict[str, tuple[int, int]] = field(default_factory=dict)  # address -> depth, elements
    narrow: set[str] = field(default_factory=set)  # addresses asked for in this or an earlier pass

    def start(self, row: str, number: str, *, scattered: bool) -> None:
        """The row that an iteration is about; `scattered`: its number was read from an array."""
        self.places[row] = _Place(number, int(scattered))

    def follow(self, row: str, index: str, source: str) -> None:
        """Row `row` is `index[source]`."""
        place = self.places.get(source)
        if place is None:
            return
        self.read(index, source, 1)
        self.places[row] = _Place(f"int64_t({index}[{place.number}])", place.depth + 1)

    def read(self, base: str, row: str, elements: int) -> None:
        """A row of so many elements of an array is read."""
        place = self.places.get(row)
        if place is None or place.depth == 0:
            return
        size = "" if elements == 1 else f" * {elements}"
        address = f"{base} + {place.number}{size}"
        if elements == 1:  # still in the cache when a later pass over the same rows comes to it
            if address in self.narrow:
                return
            self.narrow.add(address)
        self.wanted[address] = place.depth, elements

    def lines(self, bound: str) -> Iterator[str]:
        """The statements, for counters below `bound`; what was wanted is done with."""
        deepest = max((depth for depth, _ in self.wanted.values()), default=0)
        for depth in range(1, deepest + 1):
            found = [(a, n) for a, (d, n) in self.wanted.items() if d == depth]
            if not found:
                continue
            links = deepest - depth + 1
            ahead = "kAhead" if links == 1 else f"{links} * kAhead"
            yield f"if ({self.counter} + {ahead} < {bound}) {{"
            yield f"  const int64_t u = {self.counter} + {ahead};"
            for address, elements in found:
                yield f"  prefetch<{elements}>({address});"
            yield "}"
        self.wanted.clear()
