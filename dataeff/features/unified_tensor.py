"""`unified`: a tensor in host memory that operations on the GPU take as one of their own."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch import Tensor

from dataeff._flags import checked_bool
from dataeff._ops import with_memory
from dataeff.features.placement import CPU, Operand, placement
from dataeff.features.unified_execution import (
    OverHostMemory,
    as_plain,
    run_on_cpu,
    run_on_device,
    tensors_in,
)
from dataeff.features.unified_memory import UnifiedMemory
from dataeff.features.unified_ops import memory_only, num_deciding
from dataeff.memory import SharedTensor

T = TypeVar("T")


class UnifiedTensor(OverHostMemory):
    """A tensor in host memory that the GPU reads and writes in place; made by `unified`.

    For PyTorch it is a CPU tensor (`u.device` is the CPU). Where an operation runs, and so where
    its result is, follows from the other operands:

    | operation | other operands | runs on, result on |
    |---|---|---|
    | `u[i]`, `index_select`, `F.embedding`, `gather`, index on a GPU | - | that GPU, zero-copy |
    | the same, index on the CPU | - | CPU |
    | any other | one on a GPU | that GPU, reading `u` in place |
    | any other | CPU tensors, numbers or none | CPU |
    | any other, `propagate=True` | numbers, CPU scalars or none | the current GPU |
    | views: `u[2:5]`, `view`, `t`, `detach`, ... | - | unified, the same memory |
    | in place: `u.add_(y)`, `u[i] = y`, `out=u` | as above | written into `u`'s host memory |
    | `u.clone()`, `deepcopy(u)` | - | unified, memory of its own |
    | `u.cpu()`, `u.numpy()` | - | a plain tensor, an array, over the same memory |
    | `u.cuda()`, `u.to(device)`, `torch.load(map_location=device)` | - | a copy in GPU memory |

    A result on the GPU is a plain CUDA tensor, on the CPU a plain CPU tensor. CPU scalars decide
    nothing. Gradients of a unified leaf are plain CPU tensors, as its memory is on the host. The
    CPU waits for what GPUs were given to do with the memory before it touches it through a unified
    tensor; through another alias (an array, the tensor it was made of) call `u.synchronize()`
    first. A wrong row index on a GPU reads a zero row and raises at a later gather.

    A module that `torch.export` takes holds it as a parameter or buffer: as a plain attribute it
    is, like every subclass, a constant that `strict=False` cannot trace.
    """

    propagate = False  # a class, not an attribute of each view: torch.compile knows it by the type

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation where the placement rule puts it."""
        kwargs = kwargs or {}
        if memory_only(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        deciding = list(tensors_in(args[: num_deciding(func)])) + list(tensors_in(kwargs))
        with torch._C.DisableTorchFunctionSubclass():  # or each look comes here again
            operands = [Operand(x.device, x.dim(), isinstance(x, UnifiedTensor)) for x in deciding]
        device = placement(operands, _propagation(cls, func))
        if device.type == "cpu":
            return run_on_cpu(func, args, kwargs)
        return run_on_device(func, args, kwargs, device)

    def register(self, device: torch.device | str | int = "cuda") -> UnifiedTensor:
        """Registers the memory with CUDA now instead of at the first operation there.

        A compiled function or a captured graph that uses it on CUDA needs this before it.

        Raises:
            RuntimeError: CUDA refuses or is not there; says why and what helps.
        """
        if not torch.cuda.is_available():
            raise RuntimeError("this torch finds no CUDA device: unified tensors run on the CPU")
        self._unified.registered.register(torch.empty(0, device=device).device)
        return self

    def synchronize(self) -> None:
        """Waits until the GPUs are done with what they were given to do with the memory."""
        self._unified.wait(to_write=True)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"unified({_read(self)!r})"

    def __format__(self, spec: str) -> str:
        return object.__format__(self, spec) if self.dim() else format(_read(self).item(), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> UnifiedTensor:
        if id(self) not in memo:
            if not self.is_leaf:
                raise RuntimeError("only leaves of autograd's graph are deep-copied: u.detach()")
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)].__dict__.update(deepcopy(_attributes(self), memo))
            if self.grad is not None:
                memo[id(self)].grad = deepcopy(self.grad, memo)
        copy: UnifiedTensor = memo[id(self)]
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (_read(self).detach(), *_kind_of(self))


class PropagatingTensor(UnifiedTensor):
    """A unified tensor whose own operations run on the current GPU (`propagate=True`)."""

    propagate = True


def unified(x: Tensor, *, propagate: bool = False) -> UnifiedTensor:
    """A tensor over `x`'s host memory that GPU operations take as an operand, in place.

    Two changed lines give a training loop features that the GPU fetches itself:

        x = dataeff.unified(data.x)                  # not .to("cuda")
        ...
        rows = x[batch.n_id.to("cuda")]              # gathered over the bus, no copy by the CPU

    Nothing is copied; the memory stays alive with the result and is registered with CUDA when a
    GPU first uses it. Sent to another process it is shared, not copied. `UnifiedTensor` says where
    each operation runs.

    Source: PyTorch-Direct (arXiv 2101.07956).

    Args:
        x: any shape, dtype and strides, host memory. A leaf that asks for gradients gives a
            unified leaf that does.
        propagate: whether operations that no other tensor decides run on the current GPU.

    Raises:
        TypeError: `x` is no dense tensor, or `propagate` no bool.
        ValueError: `x` is not in host memory, or autograd recorded how it was made.

    Example:
        >>> u = dataeff.unified(torch.arange(6.0).view(3, 2))
        >>> u[torch.tensor([2, 0])]
        tensor([[4., 5.],
                [0., 1.]])
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        sparse = isinstance(x, Tensor)
        got = f"{x.layout}: x.to_dense()" if sparse else f"{type(x).__name__}: torch.as_tensor(x)"
        raise TypeError(f"a unified tensor is made of a dense torch.Tensor, got {got}")
    if x.is_quantized:
        raise TypeError(f"a unified tensor holds numbers, got {x.dtype}: x.dequantize()")
    if x.device.type != "cpu":
        raise ValueError(f"unified tensors are in host memory, got one on {x.device}: x.cpu()")
    if not x.is_leaf:
        raise ValueError("autograd recorded how x was made: x.detach()")
    x = with_memory(x, "x")
    _let_compiled_code_take_subclasses()
    kind = PropagatingTensor if checked_bool("propagate", propagate) else UnifiedTensor
    plain = as_plain(x).detach()
    u = plain.as_subclass(kind)
    u.__dict__["_memory"] = x._unified if isinstance(x, UnifiedTensor) else UnifiedMemory(plain)
    u.requires_grad_(x.requires_grad)
    return u


def _let_compiled_code_take_subclasses() -> None:
    # torch >= 2.11 watches the first run of a compiled function for custom operators that alias
    # their inputs, and that watch, a debugging aid, refuses every subclass of Tensor it is shown.
    from torch._functorch import config

    if hasattr(config, "check_custom_op_aliasing"):
        config.check_custom_op_aliasing = False


_TO_HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist}


def _propagation(cls: type[UnifiedTensor], func: Callable[..., Any]) -> torch.device | None:
    if not cls.propagate or func in _TO_HOST or not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def _read(x: UnifiedTensor) -> Tensor:
    """The plain tensor, once the GPUs have written what they were given to write."""
    memory: UnifiedMemory | None = x.__dict__.get("_memory")
    if memory is not None:
        memory.wait(to_write=False)
    return as_plain(x)


# --- between processes and into files -------------------------------------------------------------


def _attributes(u: UnifiedTensor) -> dict[str, Any]:
    """What was set on the tensor; `_is_param` is how PyTorch knows a parameter of a subclass."""
    return {name: value for name, value in u.__dict__.items() if name != "_memory"}


def _kind_of(u: UnifiedTensor) -> tuple[bool, bool, dict[str, Any]]:
    return u.requires_grad, u.propagate, _attributes(u)


def _rebuild(
    x: Tensor, requires_grad: bool, propagate: bool, attributes: dict[str, Any] | None = None
) -> Tensor:
    # torch.load may have been told to bring it elsewhere.
    u = unified(x, propagate=propagate) if x.device == CPU else x
    u.requires_grad_(requires_grad)
    u.__dict__.update(attributes or {})
    return u


def _receive(shared: SharedTensor, *kind: Any) -> Tensor:
    return _rebuild(shared.tensor(), *kind)


def _send(u: UnifiedTensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    u.synchronize()  # its memory may move, which the GPUs are to be done with
    with torch._C.DisableTorchFunctionSubclass():
        shared = SharedTensor(u)
    _ = u._unified  # where sharing has moved the tensor, what it has left is let go now
    return _receive, (shared, *_kind_of(u))


for _kind in (UnifiedTensor, PropagatingTensor):
    ForkingPickler.register(_kind, _send)
torch.serialization.add_safe_globals([_rebuild])
