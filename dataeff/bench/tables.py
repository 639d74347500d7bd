"""Tables of records: for the terminal (rich) and for README.md (Markdown)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dataeff.bench.record import Record

if TYPE_CHECKING:
    from rich.table import Table

KINDS = {"cpu": "CPU", "cuda": "GPU"}  # how a record's device begins -> what it is called
COLUMNS = ("{} median", "{} vs best peer", "{} share of ceiling", "{} more")  # of each kind
Row = dict[str, Record]  # metric -> record, of one provider at one size


def by_provider(records: Iterable[Record]) -> dict[str, dict[str, Row]]:
    """Groups records: size -> provider -> metric -> record, in the order they stand in."""
    grouped: dict[str, dict[str, Row]] = {}
    for record in records:
        row = grouped.setdefault(record.size, {}).setdefault(record.provider, {})
        row[record.metric] = record
    return grouped


def best_peer(providers: dict[str, Row]) -> tuple[str, float] | None:
    """The fastest peer of one size and its time in seconds."""
    times = [
        (row["time_s"].value, name)
        for name, row in providers.items()
        if _timed(row) and _role(row) == "peer"
    ]
    value, name = min(((t, name) for t, name in times if t is not None), default=(None, ""))
    return None if value is None else (name, value)


def ratio(row: Row, peer: tuple[str, float] | None) -> str:
    """How many times as fast as the best peer."""
    value = row["time_s"].value
    if peer is None or not value or _role(row) != "ours":
        return ""
    return f"{peer[1] / value:.2f}x"


def _timed(row: Row) -> bool:
    return "time_s" in row


def _role(row: Row) -> str:
    return next(iter(row.values())).role


def duration(value_s: float) -> str:
    """Seconds with three digits in the unit that suits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value_s >= scale:
            return f"{value_s / scale:.3g} {unit}" if value_s < 1000 else f"{value_s:.0f} s"
    return f"{value_s / 1e-9:.3g} ns"


def rate(row: Row) -> str:
    """Bandwidth or operations per second, whichever was recorded."""
    shown = []
    for metric in ("bandwidth_gbs", "rate_gflops"):
        if metric in row and row[metric].value is not None:
            shown.append(f"{row[metric].value:.4g} {row[metric].unit}")
    return ", ".join(shown)


def shares(row: Row) -> str:
    """`85 % of memcpy`, one per ceiling."""
    return ", ".join(
        f"{100 * record.value:.0f} % of {metric.removeprefix('share_of_')}"
        for metric, record in row.items()
        if metric.startswith("share_of_") and record.value is not None
    )


def extras(row: Row) -> str:
    """What a provider reported beside the time."""
    usual = (
        *("time_s", "time_spread_s", "time_min_s", "num_rounds"),
        *("bandwidth_gbs", "rate_gflops", "skipped"),
    )
    return ", ".join(
        f"{metric}={amount(record)}"
        for metric, record in row.items()
        if metric not in usual and not metric.startswith("share_of_")
    )


def amount(record: Record) -> str:
    """A figure in the unit that suits."""
    if record.value is None:
        return ""
    if record.unit == "bytes":
        for scale, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
            if record.value >= scale:
                return f"{record.value / scale:.3g} {unit}"
    if record.unit == "s":
        return duration(record.value)
    return f"{record.value:.4g}" + ("" if record.unit == "1" else f" {record.unit}")


def terminal_table(workload: str, records: Sequence[Record]) -> Table:
    """One table of a run: every size and provider, and why some were skipped."""
    from rich.markup import escape  # `x[index]` is a provider, not a style
    from rich.table import Table

    first = records[0]
    table = Table(title=f"{workload} on {first.device}, {_threads(first)}", title_justify="left")
    for heading in ("size", "provider"):
        table.add_column(heading, overflow="fold")
    for heading in ("median", "spread", "rate", "share of ceiling", "vs best peer"):
        table.add_column(heading, justify="right")
    table.add_column("more", overflow="fold")
    for size, providers in by_provider(records).items():
        peer = best_peer(providers)
        for index, (name, row) in enumerate(providers.items()):
            cells = (size if index == 0 else "", *_cells(name, row, peer))
            table.add_row(*(escape(cell) for cell in cells))
        table.add_section()
    return table


def _cells(name: str, row: Row, peer: tuple[str, float] | None) -> tuple[str, ...]:
    if not _timed(row):
        return (name, "", "", "", "", "", f"skipped: {row['skipped'].note}")
    median, spread = (row[metric].value or 0.0 for metric in ("time_s", "time_spread_s"))
    label = f"({name})" if _role(row) == "ceiling" else name
    cells = (duration(median), f"± {duration(spread / 2)}", rate(row), shares(row))
    return (label, *cells, ratio(row, peer), extras(row))


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """The records of a kind of device."""
    return [record for record in records if record.device.startswith(kind)]


def markdown_table(records: Sequence[Record]) -> str:
    """One workload's records as Markdown: a row per size and provider, CPU and GPU side by side.

    Columns of a kind of device without a record stay empty, and a line says so. Columns that would
    be empty for both kinds, and providers that were timed nowhere, are left out.
    """
    found = {kind: of_kind(records, kind) for kind in KINDS}
    grouped = {kind: by_provider(some) for kind, some in found.items()}
    keys = dict.fromkeys(
        (size, provider)
        for kind in KINDS
        for size, providers in grouped[kind].items()
        for provider, row in providers.items()
        if _role(row) in ("ours", "peer") and _timed(row)
    )
    rows = {
        (size, provider): {
            kind: _markdown_cells(grouped[kind].get(size, {}), provider) for kind in KINDS
        }
        for size, provider in keys
    }
    used = [
        column
        for column in range(len(COLUMNS))
        if any(cells[kind][column] for cells in rows.values() for kind in KINDS)
    ]
    headings = [COLUMNS[column].format(label) for label in KINDS.values() for column in used]
    lines = ["| size | provider | " + " | ".join(headings) + " |"]
    lines.append("|---|---|" + "--:|" * len(headings))
    for (size, provider), cells in rows.items():
        shown = [cells[kind][column] for kind in KINDS for column in used]
        lines.append(f"| {size} | {provider} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", "<br>\n".join(provenance(kind, found[kind]) for kind in KINDS)])


def _markdown_cells(providers: dict[str, Row], provider: str) -> tuple[str, ...]:
    """One cell per column of COLUMNS."""
    row = providers.get(provider)
    if row is None:
        return ("",) * len(COLUMNS)
    if not _timed(row):
        return ("skipped", "", "", "")
    median, spread = (row[metric].value or 0.0 for metric in ("time_s", "time_spread_s"))
    time_s = f"{duration(median)} ± {duration(spread / 2)}"
    return (time_s, ratio(row, best_peer(providers)), shares(row), extras(row))


def _threads(record: Record) -> str:
    return "1 thread" if record.threads == 1 else f"{record.threads} threads"


def provenance(kind: str, records: Sequence[Record]) -> str:
    """Where and when a kind's records were taken, or that there are none."""
    label = KINDS[kind]
    if not records:
        return f"{label}: no record yet, so its columns are empty."
    last = max(records, key=lambda record: record.time)
    packages = ", ".join(
        f"{name} {last.versions[name]}" for name in ("torch", "triton") if name in last.versions
    )
    busy = (
        " Other programs kept the machine busy "
        f"(load {last.load:.1f} per processor): mind the spread."
        if last.load > 0.5
        else ""
    )
    vectors = sorted({r.versions["vectors"] for r in records if "vectors" in r.versions})
    with_vectors = f" with {' and '.join(vectors)}" if vectors and kind == "cpu" else ""
    if with_vectors and any("vectors" not in r.versions for r in records):
        with_vectors += " (older rows do not say with which)"
    device = last.device.partition(": ")[2] + with_vectors
    return (
        f"{label}: {device}, {_threads(last)}, {packages}, "
        f"{_commits(records)}, {_days(records)}.{busy}"
    )


def _days(records: Sequence[Record]) -> str:
    """The day of the records, or the first and the last."""
    days = sorted({record.time[:10] for record in records})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _commits(records: Sequence[Record]) -> str:
    """The commit that was measured, or the first and the last in the order of time."""
    ordered = sorted(records, key=lambda record: record.time)
    commits = list(dict.fromkeys(record.commit or "unknown" for record in ordered))
    return f"commit {commits[0]}" if len(commits) == 1 else f"commits {commits[0]} to {commits[-1]}"
