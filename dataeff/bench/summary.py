"""The README's tables: what ours reach over all sizes of one kind of case."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dataeff.bench.record import Record
from dataeff.bench.tables import KINDS, Row, amount, best_peer, by_provider, of_kind, provenance

COLUMNS = ("{} vs fastest peer", "{} share of ceiling", "{} more")  # of each kind
WRITTEN_HERE = ("hand-written", "pattern of")  # peers that no library has begin so
CURVES = ("growth of ", "recompute, offload, keep")  # groups of cases that are a curve begin so
VARIANTS = (", passes off", ", new graph")  # and ours in another setting end so
MAX_PEERS = 2  # named in a cell; which of many it was stands in the table with every size
# What a reader asks of a workload beside its speed.
HEADLINES = {
    "rgnn": ("peak_over_tensors",),
    "offload": ("peak_saved_bytes", "exposed_wait_per_step", "step_error", "peak_error"),
}


@dataclass
class Ratios:
    """How many times as fast as the fastest peer, over sizes, and which peers those were."""

    values: list[float] = field(default_factory=list)
    peers: dict[str, None] = field(default_factory=dict)

    def add(self, time_s: float | None, peer: tuple[str, float] | None) -> None:
        """Takes one size."""
        if peer is not None and time_s:
            self.values.append(peer[1] / time_s)
            self.peers[peer[0]] = None

    def __str__(self) -> str:
        if not self.values:
            return ""
        text = f"{statistics.geometric_mean(self.values):.2f}x"
        if len(self.values) > 1:
            text += f" ({min(self.values):.2f} to {max(self.values):.2f})"
        return text + (f" {' / '.join(self.peers)}" if len(self.peers) <= MAX_PEERS else "")


@dataclass
class Line:
    """One of our providers in the cases of one group, on one kind of device."""

    fastest: Ratios = field(default_factory=Ratios)
    in_a_library: Ratios = field(default_factory=Ratios)
    shares: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, list[Record]] = field(default_factory=dict)

    def add(self, row: Row, providers: dict[str, Row]) -> None:
        """Takes one size: our row, and those of all providers."""
        time_s = row["time_s"].value
        self.fastest.add(time_s, best_peer(providers))
        theirs = {n: r for n, r in providers.items() if not n.startswith(WRITTEN_HERE)}
        self.in_a_library.add(time_s, best_peer(theirs))
        for metric, record in row.items():
            if metric.startswith("share_of_") and record.value is not None:
                self.shares.setdefault(metric.removeprefix("share_of_"), []).append(record.value)
            elif metric in HEADLINES.get(record.workload, ()) and record.value is not None:
                self.figures.setdefault(metric, []).append(record)

    def cells(self) -> tuple[str, ...]:
        """One cell per column of COLUMNS."""
        return (self._ratio(), self._shares(), self._figures())

    def _ratio(self) -> str:
        return "; ".join(dict.fromkeys(filter(None, map(str, (self.fastest, self.in_a_library)))))

    def _shares(self) -> str:
        # A roofline is made of the other ceilings.
        names = ["roofline"] if "roofline" in self.shares else list(self.shares)
        return ", ".join(
            f"{_span([f'{100 * value:.0f}' for value in sorted(self.shares[name])])} % of {name}"
            for name in names
        )

    def _figures(self) -> str:
        return ", ".join(
            f"{name.replace('_', ' ')}"
            f" {_span([amount(r) for r in sorted(found, key=lambda r: r.value or 0.0)])}"
            for name, found in self.figures.items()
        )


def _span(ordered: Sequence[str]) -> str:
    first, last = ordered[0], ordered[-1]
    return first if first == last else f"{first} to {last}"


def headlines(records: Iterable[Record]) -> list[Record]:
    """The records that a first reader asks for: no curve, nothing switched off."""
    return [
        record
        for record in records
        if not record.group.startswith(CURVES) and not record.provider.endswith(VARIANTS)
    ]


def summary_table(records: Sequence[Record], kinds: Iterable[str] = tuple(KINDS)) -> str:
    """One workload's records as Markdown: a row per group of cases and provider of ours.

    A ratio is the geometric mean over the group's sizes (and its least and greatest) of how many
    times as fast ours is as the fastest peer of the same size, and, where that was written here, as
    the fastest that a library has. Columns of a kind of device without
    a record stay empty; columns that would be empty for all `kinds` are left out.
    """
    found = {kind: of_kind(records, kind) for kind in kinds}
    lines: dict[tuple[str, str], dict[str, Line]] = {}
    sizes: dict[tuple[str, str], dict[str, None]] = {}
    for kind, some in found.items():
        for size, providers in by_provider(some).items():
            for name, row in providers.items():
                if "time_s" not in row or row["time_s"].role != "ours":
                    continue
                key = (row["time_s"].group or row["time_s"].workload, name)
                lines.setdefault(key, {}).setdefault(kind, Line()).add(row, providers)
                sizes.setdefault(key, {})[size] = None
    cells = {
        key: {kind: own[kind].cells() if kind in own else ("",) * len(COLUMNS) for kind in found}
        for key, own in lines.items()
    }
    used = [
        c for c in range(len(COLUMNS)) if any(row[k][c] for row in cells.values() for k in found)
    ]
    headings = [COLUMNS[column].format(KINDS[kind]) for kind in found for column in used]
    text = ["| what | provider | sizes | " + " | ".join(headings) + " |"]
    text.append("|---|---|--:|" + "--:|" * len(headings))
    for (group, provider), both in sorted(
        cells.items(), key=lambda item: _first(item[0][0], cells)
    ):
        shown = [both[kind][column] for kind in found for column in used]
        count = len(sizes[group, provider])
        text.append(f"| {group} | {provider} | {count} | " + " | ".join(shown) + " |")
    return "\n".join([*text, "", "<br>\n".join(provenance(kind, found[kind]) for kind in found)])


def _first(group: str, cells: Iterable[tuple[str, str]]) -> int:
    return next(number for number, key in enumerate(cells) if key[0] == group)
