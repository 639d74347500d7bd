"""The command line: `dataeff doctor`, `dataeff bench` and what else is installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence


class UserError(Exception):
    """A mistake in what was typed: shown as one line, exit code 2."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits; the console entry point.

    Args:
        arguments: what follows the program's name; `sys.argv[1:]` when None.
    """
    try:
        from dataeff.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        sys.exit(
            f"The dataeff command needs the package {missing.name}, which is not installed: "
            "pip install 'dataeff[demo]', or in a clone pip install '.[demo]'"
        )
    try:
        app(arguments)
    except UserError as mistake:
        print(f"dataeff: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dataeff: interrupted", file=sys.stderr)
        sys.exit(130)
