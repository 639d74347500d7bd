"""What the operations of PyTorch do with a unified operand: gather it, write it, only look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.features.row_gradient import GatherRows

# Operations that take of the other operands no more than the shape.
_SHAPED_LIKE = {torch.Tensor.view_as, torch.Tensor.expand_as, torch.Tensor.reshape_as}
# Operations about the tensor or its place, not about its elements.
_MEMORY_ONLY = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.stride,
    torch.Tensor.numel,
    torch.Tensor.storage_offset,
    torch.Tensor.element_size,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.is_pinned,
    torch.Tensor.is_shared,
    torch.Tensor.__len__,
    torch.Tensor.requires_grad_,
    torch.Tensor.backward,
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
    torch.Tensor.retain_grad,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_VIEW_GETTERS = {"T", "H", "mT", "mH", "real", "imag", "data"}
# Those that compiled functions use: torch 2.10 traces the look in a set, not what comes after it.
_GETTERS = {getattr(torch.Tensor, name).__get__ for name in ("shape", "device", "dtype", "ndim")}


_OPERATORS = (
    *("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)


def _name_says_in_place(name: str) -> bool:
    if name.startswith("__"):  # __iadd__, __setitem__; not __invert__
        return name == "__setitem__" or (name.startswith("__i") and name[3:-2] in _OPERATORS)
    return name.endswith("_")


def _in_place(space: Any) -> frozenset[Any]:
    found = (getattr(space, name) for name in dir(space) if _name_says_in_place(name))
    return frozenset(found) - {torch.Tensor.requires_grad_}


# Sets, not a look at each name: torch.compile traces through the question (where it cannot trace
# the functions, which it turns into methods first).
_METHODS_IN_PLACE = _in_place(torch.Tensor)
_FUNCTIONS_IN_PLACE = _in_place(torch) | _in_place(F)


def memory_only(func: Callable[..., Any]) -> bool:
    """Whether an operation runs the same wherever the elements are."""
    if func in _MEMORY_ONLY or func in _GETTERS:
        return True
    getter = getattr(func, "__self__", None)  # x.shape calls torch.Tensor.shape.__get__
    name = getattr(func, "__name__", "")
    return name in ("__get__", "__set__", "__delete__") and (
        getattr(getter, "__name__", None) not in _VIEW_GETTERS or name != "__get__"
    )


def num_deciding(func: Callable[..., Any]) -> int | None:
    """How many of the first arguments decide where an operation runs; None for all."""
    return 1 if func in _SHAPED_LIKE else None


def mutates(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation writes into its first argument or into `out`."""
    if kwargs.get("out") is not None or kwargs.get("inplace"):
        return True
    return func in _METHODS_IN_PLACE or (
        not torch.compiler.is_compiling() and func in _FUNCTIONS_IN_PLACE
    )


Gather = Callable[[Tensor], Tensor]


def gather_zero_copy(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], kind: type[Tensor]
) -> tuple[Any, Gather] | None:
    """The unified table of an operation that gathers from it, and the gather; None for others.

    What does not have the plain form (an index beside others, rows that are not contiguous, a
    dimension that is not the first) is left to PyTorch's own kernels over the aliased memory.
    """
    plan = _PLANS.get(func)
    if plan is None:
        return None
    found = plan(*args, **kwargs)
    if found is None or not isinstance(found[0], kind):
        return None
    return found


def _is_rows(table: Any, index: Any) -> bool:
    return (
        isinstance(table, Tensor)
        and isinstance(index, Tensor)
        and index.dtype in (torch.int32, torch.int64)
        and index.device.type != "cpu"
        and table.dim() > 0
        and (table.is_contiguous() or table[:1].is_contiguous())
    )


def _rows(index: Tensor, sparse: bool = False, padding_idx: int | None = None) -> Gather:
    def gather(table: Tensor) -> Tensor:
        if table.requires_grad and torch.is_grad_enabled():
            rows: Tensor = GatherRows.apply(table, index, sparse, padding_idx)  # type: ignore[no-untyped-call]
            return rows
        return torch.ops.dataeff.gather(table, index)  # type: ignore[no-any-return]

    return gather


def _plan_getitem(table: Tensor, index: Any) -> tuple[Tensor, Gather] | None:
    return (table, _rows(index)) if _is_rows(table, index) else None


def _plan_index_select(
    input: Tensor, dim: int, index: Tensor, *, out: Tensor | None = None
) -> tuple[Tensor, Gather] | None:
    plain = out is None and dim in (0, -input.dim()) and index.dim() == 1
    return (input, _rows(index)) if plain and _is_rows(input, index) else None


def _plan_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Gather] | None:
    if max_norm is not None or scale_grad_by_freq or not _is_rows(weight, input):
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return weight, _rows(input, sparse, padding_idx)


def _plan_gather(
    input: Tensor,
    dim: int,
    index: Tensor,
    *,
    sparse_grad: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Gather] | None:
    plain = out is None and not sparse_grad and index.dtype == torch.int64
    if not plain or not _is_rows(input, index) or not input.is_contiguous():
        return None
    if index.dim() != input.dim() or not -input.dim() <= dim < input.dim():
        return None
    return input, lambda table: _gather_elements(table, dim % table.dim(), index)


def _gather_elements(table: Tensor, dim: int, index: Tensor) -> Tensor:
    """`torch.gather` as a gather of single elements; a wrong index stays a wrong index."""
    wrong = (index < 0) | (index >= table.shape[dim])
    flat = index * table.stride(dim)
    for other in range(table.dim()):
        if other != dim:
            shape = [1] * table.dim()
            shape[other] = -1
            steps = torch.arange(index.shape[other], device=index.device) * table.stride(other)
            flat = flat + steps.view(shape)
    return _rows(torch.where(wrong, table.numel(), flat))(table.view(-1))


_PLANS: dict[Any, Callable[..., tuple[Tensor, Gather] | None]] = {
    torch.Tensor.__getitem__: _plan_getitem,
    torch.index_select: _plan_index_select,
    torch.Tensor.index_select: _plan_index_select,
    F.embedding: _plan_embedding,
    torch.gather: _plan_gather,
    torch.Tensor.gather: _plan_gather,
}
