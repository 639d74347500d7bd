"""Whole numbers that a user gives: taken from any type that is one, and within bounds."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor


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


def check_id_dtype(name: str, ids: Tensor) -> None:
    """Refuses ids that are neither int32 nor int64.

    Raises:
        TypeError: names the dtype, and what makes ids of such a tensor.
    """
    if ids.dtype not in (torch.int32, torch.int64):
        # .long() of a mask would be nodes 0 and 1.
        remedy = ".nonzero().view(-1) of a mask" if ids.dtype == torch.bool else ".long()"
        raise TypeError(f"{name} must be int32 or int64, not {ids.dtype}: use {remedy}")
