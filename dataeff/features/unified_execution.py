"""Runs operations with unified tensors among their operands where the placement rule says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dataeff.features.placement import CPU
from dataeff.features.unified_memory import UnifiedMemory
from dataeff.features.unified_ops import gather_zero_copy, mutates


class OverHostMemory(torch.Tensor):
    """A tensor over host memory that GPUs are given to read and write; what `unified` makes."""

    @property
    def _unified(self) -> UnifiedMemory:
        memory: UnifiedMemory | None = self.__dict__.get("_memory")
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(torch.Tensor).detach()
            if memory is None or not memory.covers(plain):  # sharing moves the memory
                memory = self.__dict__["_memory"] = UnifiedMemory(plain)
        return memory


def as_plain(x: Tensor) -> Tensor:
    """The same tensor without the rule."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments, in their order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))


def _map(values: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if type(values) in (tuple, list):
        return type(values)(_map(value, change) for value in values)
    if isinstance(values, dict):
        return {name: _map(value, change) for name, value in values.items()}
    return values


_CLONES = {torch.clone, torch.Tensor.clone}


def run_on_cpu(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU, once GPUs are done with the memory; views stay unified."""
    own = [x for x in tensors_in((args, kwargs)) if isinstance(x, OverHostMemory)]
    if torch.compiler.is_compiling():
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    for u in own:
        memory: UnifiedMemory | None = u.__dict__.get("_memory")
        if memory is not None:  # else no GPU was ever given anything to do with it
            memory.wait(to_write=mutates(func, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        for u in _written(func, args, kwargs):
            if (memory := u.__dict__.get("_memory")) is not None:
                memory.overwritten()
        if func in _CLONES:
            clone: OverHostMemory = result.as_subclass(type(own[0]))
            return clone
        if func is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        return _map(result, lambda x: _unified_view(x, own))


def _unified_view(x: Tensor, own: list[OverHostMemory]) -> Tensor:
    """A result that shares memory with a unified operand is unified too."""
    if isinstance(x, OverHostMemory) or x.device != CPU or x.layout != torch.strided:
        return x
    for u in own:
        if _share_memory(x, u):
            view = x.as_subclass(type(u))
            view.__dict__["_memory"] = u.__dict__.get("_memory")
            return view
    return x


def _share_memory(x: Tensor, y: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # torch.func's wrappers have no memory
        return False
    same: bool = x.untyped_storage()._cdata == y.untyped_storage()._cdata
    return same


class _OnDevice(torch.autograd.Function):
    """A unified tensor as one of a device; its gradient comes back to host memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alias: Tensor) -> Tensor:
        """The alias."""
        return alias.view_as(alias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """To the host."""
        return grads[0].to("cpu"), None


class _TracedOnDevice(torch.autograd.Function):
    """The same by the operator that a compiled function calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, like: Tensor) -> Tensor:
        """The alias, on the device of `like`."""
        alias: Tensor = torch.ops.dataeff.unified_alias(x.detach(), like)
        return alias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """To the host."""
        return grads[0].to("cpu"), None


def run_on_device(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> Any:
    """The operation on `device`, which reads and writes the memory in place.

    Raises:
        NotImplementedError: a compiled function writes into a unified tensor.
        RuntimeError: it writes into one that asks for gradients.
    """
    own = [x for x in tensors_in((args, kwargs)) if isinstance(x, OverHostMemory)]
    rows = gather_zero_copy(func, args, kwargs, OverHostMemory)
    if rows is not None:
        table, gather = rows
        if not torch.compiler.is_compiling():
            if device.type == "cuda":
                table._unified.registered.register(device)
            with torch._C.DisableTorchFunctionSubclass():
                result = gather(as_plain(table))
            table._unified.used(device, wrote=False)
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return gather(table)
    if torch.compiler.is_compiling():
        return _trace_on_alias(func, args, kwargs, device)
    return _run_on_alias(func, args, kwargs, device, own)


def _trace_on_alias(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> Any:
    """The same inside `torch.compile`: operators alone."""
    if _written(func, args, kwargs):
        raise NotImplementedError(
            "a compiled function cannot write from the GPU into a unified tensor: do it outside"
        )
    with torch._C.DisableTorchFunctionSubclass():
        like = next(x for x in tensors_in((args, kwargs)) if x.device == device)

    def on_device(x: Tensor) -> Tensor:
        return _TracedOnDevice.apply(x, like) if isinstance(x, OverHostMemory) else x  # type: ignore[no-untyped-call]

    with torch._C.DisableTorchFunctionSubclass():
        return func(*_map(args, on_device), **_map(kwargs, on_device))


def _run_on_alias(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    own: list[OverHostMemory],
) -> Any:
    written = _written(func, args, kwargs)
    for u in written:
        _check_writable(u)
    aliases = {id(u): u._unified.alias(as_plain(u).detach(), device) for u in own}

    def on_device(x: Tensor) -> Tensor:
        alias = aliases.get(id(x))
        if alias is None:
            return x
        if not (x.requires_grad and torch.is_grad_enabled()):
            return alias
        with torch._C.DisableTorchFunctionSubclass():
            lifted: Tensor = _OnDevice.apply(as_plain(x), alias)  # type: ignore[no-untyped-call]
            return lifted

    result = func(*_map(args, on_device), **_map(kwargs, on_device))
    for u in own:
        u._unified.used(device, wrote=any(u is w for w in written))
    for u in written:
        torch.autograd.graph.increment_version(as_plain(u))
        u._unified.overwritten()
    return _map(result, lambda x: _own_memory(x, own, written, aliases))


def _written(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[OverHostMemory]:
    """The unified tensors that the operation writes."""
    if not mutates(func, kwargs):
        return []
    targets = kwargs["out"] if kwargs.get("out") is not None else args[:1]
    return [x for x in tensors_in(targets) if isinstance(x, OverHostMemory)]


def _check_writable(u: OverHostMemory) -> None:
    if u.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a GPU operation writes in place into a unified tensor that asks for gradients: "
            "do it under torch.no_grad()"
        )


def _own_memory(
    x: Tensor, own: list[OverHostMemory], written: list[OverHostMemory], aliases: dict[int, Tensor]
) -> Tensor:
    """What was written in place is the unified tensor; nothing else aliases host memory."""
    for u in written:
        if x is aliases[id(u)]:
            return u
    for u in own:
        if _share_memory(x, aliases[id(u)]) and x.numel():
            return x.clone()
    return x
