"""Storages that live anyway: parameters, buffers and the inputs that the caller passed in.

Moving them would free nothing. They are known by storage, so that a transpose or a slice of a
weight is left alone too, and looked up when a pass begins, so that parameters whose storage was
replaced since (`model.to(...)`, sharded training) are recognised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from dataeff.offload.wrapped import inner_tensors, is_wrapper

_CASTS_AND_VIEWS = (
    "ToCopyBackward",
    "TBackward",
    "TransposeBackward",
    "PermuteBackward",
    "ViewBackward",
    "UnsafeViewBackward",
    "AliasBackward",
)


class Exclusions:
    """The storages of a model's parameters and buffers, and of the inputs of its last call."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._own: dict[int, StorageWeakRef] = {}
        self._inputs: dict[int, StorageWeakRef] = {}

    def refresh(self) -> None:
        """Looks up the storages of all parameters and buffers."""
        before, self._own = self._own, {}
        for storage in _storages(_parameters_and_buffers(self._model)):
            key = storage._cdata
            # A storage that is still referenced weakly is the same one as long as its key is.
            self._own[key] = before.get(key) or StorageWeakRef(storage)

    def add_module(self, module: torch.nn.Module) -> None:
        """Looks up one module again, whose parameters may have been gathered just now."""
        direct = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for key, weak in _weak_storages(direct):
            self._own.setdefault(key, weak)

    def set_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is being called with these."""
        self._inputs = dict(_weak_storages(tree_leaves((args, kwargs))))

    def __contains__(self, storage: object) -> bool:
        assert isinstance(storage, torch.UntypedStorage)
        # A weak reference keeps the key from being used again: found means the same storage.
        address = storage._cdata
        return address in self._own or address in self._inputs

    def is_cast(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a parameter in another dtype or layout, as autocast makes them.

        Autocast keeps such copies for the whole block, so that moving one frees nothing.
        """
        node: Any = tensor.grad_fn
        for _ in range(4):
            if node is None:
                return False
            if node.name().endswith("AccumulateGrad"):
                return node.variable.untyped_storage() in self
            if not node.name().startswith(_CASTS_AND_VIEWS):
                return False
            node = node.next_functions[0][0]
        return False


def _parameters_and_buffers(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Those of all modules. `model.parameters()` makes names and takes ten times as long."""
    pending, seen = [model], {model}
    while pending:
        module = pending.pop()
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                pending.append(child)


def _weak_storages(values: Iterable[Any]) -> Iterator[tuple[int, StorageWeakRef]]:
    for storage in _storages(value for value in values if isinstance(value, torch.Tensor)):
        yield storage._cdata, StorageWeakRef(storage)


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        if is_wrapper(tensor):
            yield from _storages(inner_tensors(tensor).values())
        elif _has_storage(tensor):
            yield tensor.untyped_storage()


def _has_storage(tensor: torch.Tensor) -> bool:
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors, uninitialised parameters
        return False
    return True
