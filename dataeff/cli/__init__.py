"""The command line: `dataeff doctor`, `dataeff demo`, `dataeff bench` and the others."""

from __future__ import annotations

import io
import os
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
            "pip install 'dataeff[cli]', or in a clone pip install '.[cli]'"
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a sign for ✓
    try:
        with _cleaning_up_when_ended():
            app(arguments)
    except UserError as mistake:
        print(f"dataeff: {mistake}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dataeff: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if not _output_is_refused():
            raise
        print(f"dataeff: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _output_is_refused() -> bool:
    """Whether standard output does not take what it was given; it is thrown away then."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # what a program has put in its place has none
        return False
    try:
        os.write(descriptor, b"\n")  # a flush has nothing left to write, and says so
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)  # or Python tries once more on its way out
        os.close(nowhere)
        return True
    return False


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
