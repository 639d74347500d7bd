"""`dataeff convert`: rows of any source into a table on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dataeff.cli import UserError


def command(
    source: Annotated[Path, typer.Argument(help=".npy, .safetensors, .parquet or .json.")],
    target: Annotated[Path, typer.Argument(help=".npy, .safetensors, or .json with --stripe.")],
    name: Annotated[
        str | None, typer.Option(help="Tensor of a .safetensors source or target.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Column of a .parquet file; again for more.")
    ] = None,
    stripe: Annotated[
        list[Path] | None, typer.Option(help="Directory that takes a stripe; again for more.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target.")] = False,
) -> None:
    """Write a table that FeatureTable.open reads; it appears whole or not at all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from dataeff.features import convert

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    console = Console(stderr=True)
    quiet = not console.is_terminal
    try:
        with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
            task = bar.add_task("rows", total=None)
            written = convert(
                source,
                target,
                name=name,
                columns=column or None,
                stripes=stripe or (),
                overwrite=overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except (OSError, EOFError, ValueError, KeyError, ModuleNotFoundError) as mistake:
        raise UserError.of(mistake) from mistake
    typer.echo(str(written))
