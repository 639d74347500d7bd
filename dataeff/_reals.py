"""Numbers that a user gives and that may have a fraction."""

from __future__ import annotations

from numbers import Real
from typing import Any


def checked_real(name: str, value: Any) -> float:
    """The value as a float of 0 or more, endless ones included.

    Raises:
        TypeError: it is no number: a string of one, True, an array.
        ValueError: it is below 0, or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is no number: float({name})")
    number = float(value)
    if not number >= 0:
        raise ValueError(f"{name}={number:g} is too small: at least 0")
    return number
