"""`dataeff doctor`: what this machine can do, and what to fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dataeff.cli.arguments import existing_directory


def command(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where files would go; the temporary directory by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show what this machine can do, what each missing thing costs, and how to get it.

    Exits with 1 when something essential is broken.
    """
    from dataeff.doctor import examine
    from dataeff.doctor.screen import as_json_text, print_screen

    findings = examine(existing_directory("--dir", directory))
    if as_json:
        typer.echo(as_json_text(findings))
    else:
        print_screen(findings)
    if any(finding.essential and not finding.ok for finding in findings):
        raise typer.Exit(1)
