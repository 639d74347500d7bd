"""Tensors made of tensors: DTensor, and the subclasses that hold quantised or scaled parts.

A wrapper subclass has no bytes of its own. It can be taken apart into the tensors that it holds and
put together again (`__tensor_flatten__`, `__tensor_unflatten__`, as `torch.compile` does); each of
these is saved like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _python_dispatch

from dataeff.offload.identity import changed_in_place

# As a type guard it would have mypy believe that no tensor passes.
_is_wrapper: Callable[[object], Any] = _python_dispatch.is_traceable_wrapper_subclass


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the tensor can be taken apart and put together. Nested tensors are left whole."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or tensor.is_nested:
        return False
    found: bool = _is_wrapper(tensor)
    return found


def inner_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a wrapper holds, by name."""
    parts = ((name, getattr(tensor, name)) for name in _names(tensor))
    return {name: part for name, part in parts if isinstance(part, torch.Tensor)}


def _without_parts(tensor: torch.Tensor) -> torch.Tensor:
    """An alias that shares the wrapper's version counter and holds none of its memory.

    What is done to a wrapper in place is counted on the wrapper, not on the tensors that it holds.
    """
    alias = tensor.detach()
    for name, part in inner_tensors(alias).items():
        setattr(alias, name, torch.empty(0, dtype=part.dtype, device=part.device))
    return alias


def _names(tensor: torch.Tensor) -> list[str]:
    names: list[str] = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    return names


class Wrapped:
    """A saved wrapper: its parts, each packed, and how they go together."""

    __slots__ = ("_context", "_kind", "_others", "_parts", "_probe", "_size", "_stride", "_version")

    def __init__(self, tensor: torch.Tensor, parts: dict[str, Any]) -> None:
        self._kind, self._parts = type(tensor), parts
        # Newer DTensors name their device mesh among the parts.
        self._others = {name: getattr(tensor, name) for name in _names(tensor) if name not in parts}
        _, self._context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        self._size, self._stride = tensor.size(), tensor.stride()
        self._probe, self._version = _without_parts(tensor), tensor._version

    @classmethod
    def of(cls, tensor: torch.Tensor, pack: Callable[[torch.Tensor], Any]) -> Wrapped:
        """Packs each tensor that `tensor` holds."""
        return cls(tensor, {name: pack(part) for name, part in inner_tensors(tensor).items()})

    def rebuild(self, unpack: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """The saved wrapper over its unpacked parts.

        Raises RuntimeError when it was changed in place after it was saved.
        """
        if self._probe._version != self._version:
            raise changed_in_place(tuple(self._size), self._version, self._probe._version)
        parts = {name: unpack(part) for name, part in self._parts.items()}
        rebuilt: torch.Tensor = self._kind.__tensor_unflatten__(  # type: ignore[attr-defined]
            {**self._others, **parts}, self._context, self._size, self._stride
        )
        return rebuilt
