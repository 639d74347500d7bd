"""Writes the tables of README.md and docs/benchmarks.md from benchmarks/results/*.json.

Between `<!-- table: NAME -->` and `<!-- end -->` stands the table of the workload NAME, from the
latest records of each size on a CPU and on a GPU; `<!-- summary: NAME -->` is the table over all
sizes, without what only shows growth or a setting, and `<!-- others: NAME -->` the table over all
sizes of each further device. `<!-- targets: all -->` holds what is wanted of all workloads beside
what was measured.
`--check` changes nothing and fails when something would change. The curves of recomputing,
offloading and keeping are drawn beside them: docs/rok-cpu.svg, docs/rok-cuda.svg.

    python benchmarks/make_tables.py [--check] [FILE...]
"""

import argparse
import re
import sys
from pathlib import Path

from dataeff.bench import NAMES, Record, read
from dataeff.bench.offload import rok
from dataeff.bench.summary import headlines, summary_table
from dataeff.bench.tables import markdown_table
from dataeff.bench.target import targets_table
from dataeff.bench.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
KINDS = ("cpu", "cuda")
MARKED = re.compile(
    r"(<!-- (table|summary|others|targets): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL
)


def load(results: Path) -> list[Record]:
    return [record for path in sorted(results.glob("*.json")) for record in read(path)]


def by_device(records: list[Record], workload: str) -> dict[str, list[Record]]:
    """Of each device the records of each size's last day; the device with most sizes comes first.

    A run of a part of the sizes leaves the others as they were. Of devices with as many sizes the
    one measured last comes first.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        if record.workload == workload:
            found.setdefault(record.device, []).append(record)
    for device, own in found.items():
        days: dict[str, str] = {}
        for record in own:
            days[record.size] = max(days.get(record.size, ""), record.time[:10])
        found[device] = [record for record in own if record.time[:10] == days[record.size]]

    def weight(device: str) -> tuple[int, str]:
        own = found[device]
        return len({record.size for record in own}), max(record.time for record in own)

    return {device: found[device] for device in sorted(found, key=weight, reverse=True)}


def latest(records: list[Record], workload: str) -> list[Record]:
    """Of each kind of device the records of the one with most sizes."""
    found = by_device(records, workload)
    of_kind = [[own for name, own in found.items() if name.startswith(kind)] for kind in KINDS]
    return [record for devices in of_kind for record in (devices[0] if devices else [])]


def others(records: list[Record], workload: str) -> str:
    """A summary of each device that `latest` leaves out."""
    shown = {record.device for record in latest(records, workload)}
    left = [own for name, own in by_device(records, workload).items() if name not in shown]
    return "\n\n".join(summary_table(own, kinds_of(own)) for own in left)


def summary_of_headlines(records: list[Record]) -> str:
    return summary_table(headlines(records))


def kinds_of(records: list[Record]) -> list[str]:
    """The kinds of device that there are records of."""
    return [kind for kind in KINDS if any(record.device.startswith(kind) for record in records)]


def fill(text: str, records: list[Record]) -> str:
    """`text` with every marked table written anew."""

    def table(match: re.Match[str]) -> str:
        begin, form, workload, end = match.groups()
        found = latest(records, workload)
        if form == "targets":
            body = targets_table(TARGETS, [r for name in NAMES for r in latest(records, name)])
        elif form == "others":
            body = others(records, workload)
        else:
            make = summary_of_headlines if form == "summary" else markdown_table
            body = make(found) if found else ""
        body = body or f"No record of `{workload}`."
        return f"{begin}\n{body}\n\n{end}"

    return MARKED.sub(table, text)


def draw(records: list[Record]) -> None:
    """Writes the curve of each kind of device that has records of one."""
    points = [r for r in latest(records, "offload") if r.size.startswith("rok: ")]
    for kind in KINDS:
        if found := [record for record in points if record.device.startswith(kind)]:
            rok.plot(found, ROOT / "docs" / f"rok-{kind}.svg")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    arguments = parser.parse_args()
    records = load(ROOT / "benchmarks" / "results")
    texts = {path: path.read_text() for path in arguments.files}
    stale = [path for path, text in texts.items() if fill(text, records) != text]
    for path in stale:
        if arguments.check:
            print(f"{path} is not what the records give: run benchmarks/make_tables.py")
        else:
            path.write_text(fill(texts[path], records))
    if not arguments.check:
        draw(records)
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
