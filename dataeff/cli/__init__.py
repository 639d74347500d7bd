"""The command line: `dataeff doctor`, `dataeff demo`, `dataeff bench` and the others."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_ENDS = (signal.SIGTERM, signal.SIGHUP)


class UserError(Exception):
    """A mistake in what was typed: shown as one line, exit code 2."""

    @classmethod
    def of(cls, error: Exception, option: str = "") -> UserError:
        """`error` without its number or the quotes of a KeyError, after the option it is about."""
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = (
                error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
            )
        elif isinstance(error, KeyError):
            text = str(error.args[0])
        return cls(f"{option}: {text}" if option else text)


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
        with _cleaning_up_when_ended():
            app(arguments)
    except UserError as mistake:
        print(f"dataeff: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dataeff: interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _cleaning_up_when_ended() -> Iterator[None]:
    """A signal that ends a process ends this one as Ctrl-C does: temporary folders are removed."""
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [one for one in _ENDS if signal.getsignal(one) is signal.SIG_DFL]
    for one in ours:
        signal.signal(one, _exit)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
