"""Assembles the commands; the command line of each is the module of its name here."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from dataeff._version import __version__

COMMANDS = ("doctor", "demo", "bench", "convert", "plan", "rgnn")

app = typer.Typer(
    name="dataeff",
    help="Data-efficient deep-learning training on GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dataeff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Data-efficient deep-learning training on GPUs."""


def _add_commands() -> None:
    for name in COMMANDS:
        found = import_module(f"dataeff.cli.{name}").command
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name)(found)


_add_commands()
