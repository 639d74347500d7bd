"""Writes the tables of README.md and docs/benchmarks.md from benchmarks/results/*.json.

Between `<!-- table: NAME -->` and `<!-- end -->` stands the table of the workload NAME, from the
latest records of each size on a CPU and on a GPU; `<!-- summary: NAME -->` is the table over all
sizes.
`--check` changes nothing and fails when something would change. The curves of recomputing,
offloading and keeping are drawn beside them: docs/rok-cpu.svg, docs/rok-cuda.svg.

    python benchmarks/make_tables.py [--check] [FILE...]
"""

import argparse
import re
import sys
from pathlib import Path

from dataeff.bench import Record, read
from dataeff.bench.offload import rok
from dataeff.bench.summary import summary_table
from dataeff.bench.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
KINDS = ("cpu", "cuda")
MARKED = re.compile(r"(<!-- (table|summary): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(results: Path) -> list[Record]:
    return [record for path in sorted(results.glob("*.json")) for record in read(path)]


def latest(records: list[Record], workload: str) -> list[Record]:
    """Of each kind of device the one measured last, and there each size's records of its last day.

    A run of a part of the sizes leaves the others as they were.
    """
    chosen: list[Record] = []
    for kind in KINDS:
        found = [r for r in records if r.workload == workload and r.device.startswith(kind)]
        device = max(found, key=lambda record: record.time).device if found else ""
        found = [record for record in found if record.device == device]
        days: dict[str, str] = {}
        for record in found:
            days[record.size] = max(days.get(record.size, ""), record.time[:10])
        chosen += [record for record in found if record.time[:10] == days[record.size]]
    return chosen


def fill(text: str, records: list[Record]) -> str:
    """`text` with every marked table written anew."""

    def table(match: re.Match[str]) -> str:
        begin, form, workload, end = match.groups()
        found = latest(records, workload)
        make = summary_table if form == "summary" else markdown_table
        body = make(found) if found else f"No record of `{workload}`."
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
