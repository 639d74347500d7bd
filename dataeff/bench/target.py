"""A bound that records are held against: what is wanted, measured, and whether it holds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dataeff.bench.record import Record
from dataeff.bench.tables import KINDS, Row, by_provider, of_kind

# Of one size: our row and the rows of all providers -> the figure; None where there is none.
Reading = Callable[[Row, dict[str, Row]], float | None]
CPU, GPU = KINDS


def speedup(peers: str) -> Reading:
    """How many times as fast as the fastest provider whose name begins as `peers`, a pattern."""

    def read(row: Row, providers: dict[str, Row]) -> float | None:
        theirs = [_value(r, "time_s") for name, r in providers.items() if re.match(peers, name)]
        times, ours = [time for time in theirs if time], _value(row, "time_s")
        return min(times) / ours if times and ours else None

    return read


def figure(metric: str) -> Reading:
    """A figure of ours, as it was recorded."""
    return lambda row, providers: _value(row, metric)


def share(metric: str, provider: str, of: str | None = None) -> Reading:
    """Our `metric` over `of` (the same by default) of another provider, which may be ours too."""

    def read(row: Row, providers: dict[str, Row]) -> float | None:
        ours, whole = _value(row, metric), _value(providers.get(provider, {}), of or metric)
        return ours / whole if ours is not None and whole else None

    return read


def _value(row: Row, metric: str) -> float | None:
    return row[metric].value if metric in row else None


@dataclass(frozen=True)
class Cases:
    """Which records count: `groups` begin so, `sizes` hold it, `ours` is the provider's name.

    All three are patterns.
    """

    workload: str
    groups: str
    sizes: str = ""
    ours: str = "dataeff"

    def read(self, reading: Reading, records: Iterable[Record]) -> list[float]:
        """One figure per size and provider of ours that has one."""
        own = [
            record
            for record in records
            if record.workload == self.workload
            and re.match(self.groups, record.group)
            and re.search(self.sizes, record.size)
        ]
        found = (
            reading(row, providers)
            for providers in by_provider(own).values()
            for name, row in providers.items()
            if re.fullmatch(self.ours, name)
        )
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class Target:
    """A figure of each size of some cases, and its bounds.

    Attributes:
        what, against: as the table says it.
        mean: bounds the geometric mean over the sizes.
        each: bounds every size.
        upper: the bounds are upper ones.
        percent: shown as a percentage, else as so many times.
        kind: of device, `cpu` or `cuda`.
    """

    cases: Cases
    what: str
    against: str
    reading: Reading
    mean: float | None = None
    each: float | None = None
    upper: bool = False
    percent: bool = False
    kind: str = CPU

    def wanted(self) -> str:
        """`at least 1.5x, each 1x`."""
        bounds = [("", self.mean), ("" if self.mean is None else "each ", self.each)]
        shown = [label + self._shown(bound) for label, bound in bounds if bound is not None]
        return f"at {'most' if self.upper else 'least'} {', '.join(shown)}"

    def measured(self, figures: Sequence[float]) -> str:
        """The mean, and in brackets from the worst to the best; zeros have no geometric mean."""
        worst, best = sorted((min(figures), max(figures)), reverse=self.upper)
        if len(figures) == 1:
            return self._shown(worst)
        span = f"{self._shown(worst)} to {self._shown(best)}, {len(figures)} figures"
        return span if min(figures) <= 0 else f"{self._shown(_mean(figures))} ({span})"

    def reached(self, figures: Sequence[float]) -> bool:
        """Whether both bounds hold."""
        sign = -1 if self.upper else 1
        worst = min(sign * value for value in figures)
        return (self.each is None or worst >= sign * self.each) and (
            self.mean is None or sign * _mean(figures) >= sign * self.mean
        )

    def _shown(self, value: float) -> str:
        return f"{100 * value:.3g} %" if self.percent else f"{value:.3g}x"


_mean = statistics.geometric_mean


def targets_table(targets: Iterable[Target], records: Sequence[Record]) -> str:
    """The targets as Markdown, a row each: wanted, measured, and whether that is enough."""
    lines = ["| on | what | against | wanted | measured | |", "|---|---|---|---|---|---|"]
    for target in targets:
        figures = target.cases.read(target.reading, of_kind(records, target.kind))
        measured = target.measured(figures) if figures else ""
        mark = ("reached" if target.reached(figures) else "**missed**") if figures else "no record"
        cells = (target.what, target.against, target.wanted(), measured, mark)
        lines.append(f"| {KINDS[target.kind]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _measured_on(records)])


def _measured_on(records: Iterable[Record]) -> str:
    """Which workloads were measured on which device."""
    devices: dict[str, dict[str, None]] = {}
    for record in records:
        devices.setdefault(record.device, {})[record.workload] = None
    shown = (f"{device} ({', '.join(workloads)})" for device, workloads in devices.items())
    return f"Measured on {'; '.join(shown)}."
