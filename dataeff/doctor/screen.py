"""Shows findings: one screen for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from dataeff.doctor.finding import Finding

if TYPE_CHECKING:
    from rich.console import Console


def as_json_text(findings: Sequence[Finding]) -> str:
    """`{"ok": ..., "findings": [...]}`; ok is false when something essential is broken."""
    rows = [asdict(finding) for finding in findings]
    for row, finding in zip(rows, findings, strict=True):
        if finding.ok:  # what is as it should be costs nothing
            row["cost"] = row["remedy"] = ""
    healthy = all(finding.ok for finding in findings if finding.essential)
    return json.dumps({"ok": healthy, "findings": rows}, indent=2)


def print_screen(findings: Sequence[Finding], console: Console | None = None) -> None:
    """A table by area; under each thing missing, its cost and its remedy."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(width=2)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for area, found in groupby(findings, key=lambda finding: finding.area):
        table.add_row("", f"[bold]{area}[/bold]", "")
        for finding in found:
            table.add_row(mark(finding), finding.name, escape(finding.value))
            if not finding.ok:
                table.add_row("", "", f"[dim]costs:[/dim] {escape(finding.cost)}")
                table.add_row("", "", f"[dim]to get it:[/dim] {escape(finding.remedy)}")
    console.print(table)
    num_missing = sum(not finding.ok for finding in findings)
    console.print(f"\n{len(findings) - num_missing} of {len(findings)} as they should be.")


def mark(finding: Finding) -> str:
    """A coloured sign: fine, missing, or missing and essential."""
    if finding.ok:
        return "[green]✓[/green]"
    return "[red]✗[/red]" if finding.essential else "[yellow]–[/yellow]"
