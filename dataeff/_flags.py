"""Flags that a user gives: true or false, and nothing that merely counts as one of them."""

from __future__ import annotations

from typing import Any

import numpy as np


def checked_bool(name: str, value: Any) -> bool:
    """The value as a bool.

    Raises:
        TypeError: it is neither Python's bool nor NumPy's; "no" would count as true.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r} is neither True nor False")
    return bool(value)
