"""Whole numbers that a user gives: taken from any type that is one, and within bounds."""

from __future__ import annotations

from typing import Any, SupportsIndex


def checked_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The value as an int.

    Raises:
        TypeError: it is no integer; a float is none, whatever its value, nor is True.
        ValueError: it is below `least` or above `most`.
    """
    try:
        # Python takes ten times as long to look whether an object has a protocol's methods.
        if type(value) is not int and (
            isinstance(value, bool) or not isinstance(value, SupportsIndex)
        ):
            raise TypeError
        number = value.__index__()  # which arrays have, and refuse unless they are one integer
    except TypeError:
        raise TypeError(f"{name}={value!r} is no integer: int({name})") from None
    if least is not None and number < least:
        raise ValueError(f"{name}={number} is too small: at least {least}")
    if most is not None and number > most:
        raise ValueError(f"{name}={number} is too large: at most {most}")
    return number
