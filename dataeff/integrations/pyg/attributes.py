"""What of a PyG graph stands in no table: what belongs to all of it, or to all of a type."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dataeff.features.whole_files import whole_file

Attributes: TypeAlias = dict[Any, dict[str, Any]]  # by node or edge type, None for the graph

_PLAIN = (bool, int, float, str, type(None))


def kept_attributes(found: list[tuple[Any, str, Any]]) -> Attributes:
    """Those of (type, name, value) that a file can hold; one warning names the others."""
    kept: Attributes = {}
    left_out = []
    for group, name, value in found:
        try:
            kept.setdefault(group, {})[name] = _plain(value)
        except TypeError as error:
            left_out.append(f"{name} of {'the graph' if group is None else group} ({error})")
    if left_out:
        warnings.warn(
            f"save_dataset leaves out {', '.join(left_out)}: it keeps dense tensors, numbers, "
            "strings, None, and lists, tuples and dicts of them",
            stacklevel=3,
        )
    return {group: values for group, values in kept.items() if values}


def _plain(value: Any) -> Any:
    """The value, its tensors in memory of their own on the host.

    Raises:
        TypeError: it is of another class than a file holds, whose name is the message.
    """
    kind: Any = type(value)
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{value.layout}")
        return value.detach().cpu().clone()
    if kind in _PLAIN:
        return value
    if kind in (list, tuple):
        return kind(_plain(one) for one in value)
    if kind is dict:
        return {_plain_key(key): _plain(one) for key, one in value.items()}
    raise TypeError(kind.__name__)


def _plain_key(key: Any) -> Any:
    if isinstance(key, Tensor):
        raise TypeError("dict by tensors")
    return _plain(key)


def write_attributes(kept: Attributes, path: Path) -> None:
    """Writes them into a file of `torch.save`.

    Raises:
        OSError: there is no space for it.
    """
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    with whole_file(path, buffer.tell(), overwrite=False) as file:
        file.write(buffer.getbuffer())


def read_attributes(path: Path) -> Attributes:
    """What `write_attributes` wrote; runs no code of the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        kept: Attributes = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, write the dataset again: {error}") from error
    return kept
