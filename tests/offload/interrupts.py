"""An exception between any two instructions of Python, as a signal's handler raises it.

CPython runs signal handlers when a function begins, when a call has returned (and its result is not
yet stored) and when a loop begins again. A trace function that is asked before each instruction
raises at just these places.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import CodeType, FrameType
from typing import Any

import dataeff

PACKAGE = os.path.dirname(dataeff.__file__)
ROOMS = tuple(os.path.join(PACKAGE, room) + os.sep for room in ("offload", "storage", "memory"))

Place = tuple[CodeType, int]  # a function, and the byte offset of an instruction


@contextmanager
def traced(seen: Callable[[Place], None], skipped: tuple[CodeType, ...]) -> Iterator[None]:
    """Calls `seen` before each instruction of the three rooms, but of the functions `skipped`."""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(ROOMS):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        if event == "opcode" and code not in skipped:
            seen((code, frame.f_lasti))
        return trace

    ignored, sys.unraisablehook = sys.unraisablehook, lambda error: None  # of finalisers
    # Python 3.12 asks before instructions only if some frame wanted it when this is called
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)
        sys.unraisablehook = ignored


@cache
def may_strike(code: CodeType) -> frozenset[int]:
    """The offsets of the instructions of a function before which a handler may run."""
    found, before = set[int](), ""
    for instruction in dis.get_instructions(code):
        if before.startswith(("RESUME", "CALL")):
            found.add(instruction.offset)
        if "JUMP_BACKWARD" in instruction.opname:
            found.add(instruction.argval)
        before = instruction.opname
    return frozenset(found)


def places_in(run: Callable[[], object], skipped: tuple[CodeType, ...] = ()) -> dict[Place, int]:
    """How often `run()` comes to each instruction before which a handler may run."""
    counts: dict[Place, int] = {}

    def count(place: Place) -> None:
        if place[1] in may_strike(place[0]):
            counts[place] = counts.get(place, 0) + 1

    with traced(count, skipped):
        run()
    return counts


def interrupt(
    run: Callable[[], object], place: Place, nth: int, skipped: tuple[CodeType, ...] = ()
) -> bool:
    """`run()`, with a KeyboardInterrupt before the `nth` time of `place`; whether it came."""
    left = nth

    def strike(now: Place) -> None:
        nonlocal left
        if now == place:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    with suppress(KeyboardInterrupt), traced(strike, skipped):
        run()
    return left <= 0


def named(place: Place) -> str:
    """File, function and line, for messages."""
    code, offset = place
    lines = [line for begin, end, line in code.co_lines() if begin <= offset < end]
    where = os.path.relpath(code.co_filename, PACKAGE)
    return f"{where}:{lines[0] if lines else '?'} {code.co_qualname} at {offset}"
