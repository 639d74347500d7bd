"""The process a cache belongs to: closed before the interpreter exits, refused after a fork."""

from __future__ import annotations

import atexit
import functools
import os
import weakref
from typing import Protocol


class Closable(Protocol):
    """Something that must be closed while the engines still run."""

    def close(self) -> None:
        """Waits for its transfers and gives its resources back."""


_open: weakref.WeakSet[Closable] = weakref.WeakSet()


@functools.cache
def _register() -> None:
    @atexit.register
    def close_all() -> None:
        first: Exception | None = None
        for one in list(_open):
            try:
                one.close()
            except Exception as error:  # of a lost device, say; the others close all the same
                first = first or error
        if first is not None:
            raise first


def close_at_exit(one: Closable) -> None:
    """Closes `one` at exit if it is still alive then.

    Registered when the first one is made and not on import: it must run before the engines' own.
    """
    _open.add(one)
    _register()


class Process:
    """The process that made an object whose threads do not survive `fork()`.

    Attributes:
        is_other: whether this is a forked child of it. Set by the fork: it is asked for every saved
            tensor.
    """

    def __init__(self) -> None:
        self.is_other = False
        _made_here.add(self)

    def error(self) -> RuntimeError:
        """What to raise in a forked child."""
        return RuntimeError(
            "this ActivationOffload was made in another process: the threads that move its "
            "bytes do not survive fork(). Make a new one in the child."
        )


_made_here: weakref.WeakSet[Process] = weakref.WeakSet()


def _forked() -> None:
    for process in _made_here:
        process.is_other = True


os.register_at_fork(after_in_child=_forked)
