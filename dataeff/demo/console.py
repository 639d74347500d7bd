"""What the demo shows in the terminal: progress bars while it runs, a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


class Console:
    """Progress bars and lines of text.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.rich = RichConsole(quiet=quiet, highlight=False)

    @contextmanager
    def task(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar; the block calls what it is given with (done, total)."""
        columns = (
            TextColumn("{task.description:<36}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.rich) as progress:
            bar = progress.add_task(description, total=None)
            yield lambda done, total: progress.update(bar, completed=done, total=total)

    def heading(self, text: str) -> None:
        """One line above a part."""
        self.rich.rule(f"[bold]{text}", align="left")

    def print(self, text: str) -> None:
        """A line of text; rich's markup holds in it."""
        self.rich.print(text)

    def paths(self, *paths: Path) -> None:
        """One path a line, as it is: neither marked up nor folded."""
        for path in paths:
            self.rich.print(str(path), markup=False, soft_wrap=True)

    def summary(self, rows: list[tuple[str, list[tuple[str, str]]]]) -> None:
        """The headline figures: groups of (what, value)."""
        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_column(justify="left")
        table.add_column(justify="right")
        for group, figures in rows:
            table.add_row(f"[bold]{group}", "")
            for what, value in figures:
                table.add_row(f"  {what}", value)
        self.rich.print(table)


def readable_bytes(nbytes: float) -> str:
    """`1536` is `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")


def headline(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The figures that say whether it worked, for the table and the page."""
    gnn, lm = report["gnn"], report["lm"]
    moved = ", ".join(f"{readable_bytes(n)} {way}" for way, n in gnn["bytes_gathered"].items())
    return [
        (
            "Relational GNN, features in host memory",
            [
                ("graph", f"{gnn['num_nodes']:,} nodes, {gnn['num_edges']:,} edges"),
                ("relations, classes", f"{gnn['num_relations']}, {gnn['num_classes']}"),
                ("test accuracy: relational attention", f"{gnn['test_accuracy']:.1%}"),
                ("test accuracy: features-only MLP", f"{gnn['mlp_accuracy']:.1%}"),
                ("test accuracy: majority class", f"{gnn['majority_accuracy']:.1%}"),
                ("rows gathered", f"{gnn['rows_gathered']:,} ({moved})"),
                ("training time", f"{gnn['train_s']:.0f} s for {gnn['num_epochs']:.1f} epochs"),
            ],
        ),
        (
            "Language model, activations on disk",
            [
                ("losses and weights, bit for bit", _same(lm)),
                ("saved activations held: keep", readable_bytes(lm["peak_saved_bytes_keep"])),
                (
                    "saved activations held: offload",
                    f"{readable_bytes(lm['peak_saved_bytes_offload'])} "
                    f"({lm['peak_saved_share']:.0%} of keep)",
                ),
                ("written to disk", readable_bytes(lm["bytes_written"])),
                ("read from disk", readable_bytes(lm["bytes_read"])),
                ("exposed wait", f"{lm['exposed_wait_s']:.2f} s in {lm['num_steps']} steps"),
                ("step time, offload / keep", f"{lm['step_time_ratio']:.2f}"),
            ],
        ),
    ]


def _same(lm: dict[str, Any]) -> str:
    return "identical" if lm["weights_identical"] and lm["losses_identical"] else "DIFFERENT"
