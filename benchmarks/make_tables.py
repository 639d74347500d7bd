"""Writes the tables of README.md from benchmarks/results/*.json.

Between `<!-- table: NAME -->` and `<!-- end -->` stands the table of the workload NAME, from the
latest run on a CPU and the latest on a GPU. `--check` changes nothing and fails when something
would change.

    python benchmarks/make_tables.py [--check] [FILE]
"""

import argparse
import re
import sys
from pathlib import Path

from dataeff.bench import Record, read
from dataeff.bench.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(results: Path) -> list[Record]:
    return [record for path in sorted(results.glob("*.json")) for record in read(path)]


def latest(records: list[Record], workload: str) -> list[Record]:
    """The records of the workload's last run on each kind of device."""
    chosen: list[Record] = []
    for kind in ("cpu", "cuda"):
        found = [r for r in records if r.workload == workload and r.device.startswith(kind)]
        last = max((record.time for record in found), default="")
        chosen += [record for record in found if record.time == last]
    return chosen


def fill(text: str, records: list[Record]) -> str:
    """`text` with every marked table written anew."""

    def table(match: re.Match[str]) -> str:
        found = latest(records, match[2])
        body = markdown_table(found) if found else f"No record of `{match[2]}` yet."
        return f"{match[1]}\n{body}\n\n{match[3]}"

    return MARKED.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    text = arguments.file.read_text()
    filled = fill(text, load(ROOT / "benchmarks" / "results"))
    if arguments.check and filled != text:
        print(f"{arguments.file} is not what the records give: run benchmarks/make_tables.py")
        return 1
    if filled != text:
        arguments.file.write_text(filled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
