"""Storages that live anyway: parameters, buffers and the inputs that the caller passed in.

Moving them would free nothing. Those of the model are known by storage, so that a transpose or a
slice of a weight is left alone too, and looked up when a pass begins, so that parameters whose
storage was replaced since (`model.to(...)`, sharded training) are recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
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
    "CloneBackward",
)


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_REQUIRES_GRAD: Callable[[torch.Tensor], bool] = attrgetter("requires_grad")


class Exclusions:
    """The storages of a model's parameters and buffers, and of the inputs of its last call.

    A storage is known by its address; a weak reference keeps that from being used again, so that
    found means the same storage.

    Attributes:
        own: the storages of parameters and buffers, by address.
        inputs: those of the inputs.
        parameters: bytes of its storage by the `id` of each parameter.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._held: list[torch.Tensor] = []  # so that an id in `parameters` is nobody else's
        # Of what has no gradient: its element types by its sizes, sorted.
        self._fixed: dict[tuple[int, ...], set[torch.dtype]] = {}
        self.own: dict[int, StorageWeakRef] = {}
        self.inputs: dict[int, StorageWeakRef] = {}
        self.parameters: dict[int, int] = {}

    def refresh(self) -> None:
        """Looks up the storages of all parameters and buffers."""
        # Once a step, so in one loop: the storage that is still there needs no new reference.
        before, own = self.own, dict[int, StorageWeakRef]()
        parameters, held = dict[int, int](), list[torch.Tensor]()
        self._fixed = {}
        for tensor in _parameters_and_buffers(self._model):
            if not tensor.requires_grad and not is_lazy(tensor):
                self._fixed.setdefault(_sizes(tensor), set()).add(tensor.dtype)
            if type(tensor) in _PLAIN_TYPES and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                address = storage._cdata
                own[address] = before.get(address) or StorageWeakRef(storage)
                if type(tensor) is torch.nn.Parameter:
                    parameters[id(tensor)] = storage.nbytes()
                    held.append(tensor)
            else:
                own.update(_weak_storages([tensor]))
        self.own, self.parameters, self._held = own, parameters, held

    def num_trained(self) -> int:
        """How many of the parameters last looked up need a gradient now."""
        return sum(map(_REQUIRES_GRAD, self._held))

    def add_module(self, module: torch.nn.Module) -> None:
        """Looks up one module again, whose parameters may have been gathered just now."""
        direct = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for key, weak in _weak_storages(direct):
            self.own.setdefault(key, weak)

    def set_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is being called with these."""
        self.inputs = dict(_weak_storages(tree_leaves((args, kwargs))))

    def __contains__(self, storage: torch.UntypedStorage) -> bool:
        address = storage._cdata
        return address in self.own or address in self.inputs

    def is_cast(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a parameter, of any module, or buffer in another dtype or layout.

        Autocast keeps the copies that it makes of parameters for the whole block, so that moving
        one frees nothing. Of those that have a gradient the graph tells; of frozen ones and of
        buffers their size must do: a tensor that needs no gradient, has the size of one of them and
        another dtype.
        """
        if not tensor.requires_grad:
            dtypes = self._fixed.get(_sizes(tensor))
            return dtypes is not None and tensor.dtype not in dtypes
        node: Any = tensor.grad_fn
        for _ in range(4):
            if node is None:
                return False
            if node.name().endswith("AccumulateGrad"):
                leaf = node.variable
                return isinstance(leaf, torch.nn.Parameter) or leaf.untyped_storage() in self
            if not node.name().startswith(_CASTS_AND_VIEWS):
                return False
            node = node.next_functions[0][0]
        return False


def _sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(sorted(tensor.shape))


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
    for storage in storages_of(value for value in values if isinstance(value, torch.Tensor)):
        yield storage._cdata, StorageWeakRef(storage)


def storages_of(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    """The storages of tensors, of wrappers those within; none of what has no storage."""
    for tensor in tensors:
        if is_wrapper(tensor):
            yield from storages_of(inner_tensors(tensor).values())
        elif _has_storage(tensor):
            yield tensor.untyped_storage()


def _has_storage(tensor: torch.Tensor) -> bool:
    if is_lazy(tensor):
        return False
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors
        return False
    return True
