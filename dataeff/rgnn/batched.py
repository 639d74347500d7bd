"""Batches of layer calls: `torch.func.vmap` and `is_grads_batched` run the samples in turn.

Samples share the graph, and a layer's kernels fill the cores with one sample, so there is nothing
to fuse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from dataeff._ops import library

wrapped = torch._C._functorch.is_functorch_wrapped_tensor
unwrapped = torch._C._functorch.get_unwrapped


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Whether torch.func transforms what runs now."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def requires_grad(tensor: Tensor) -> bool:
    """Whether a gradient of the tensor may be asked for, at any level of `torch.func`.

    Within `vmap` a slice says that it requires none, also where what it is a slice of does.
    """
    while not tensor.requires_grad and wrapped(tensor):
        tensor = unwrapped(tensor)
    return tensor.requires_grad


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor stands for the samples of a `vmap`, at any level."""
    while wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = unwrapped(tensor)
    return False


def in_turn(
    function: Callable[..., Any], batch_size: int, in_dims: Any, args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Results of one sample after another, stacked, and their batch dimensions.

    Args:
        function: takes the arguments of one sample, with tensors anywhere in them.
        batch_size: samples.
        in_dims: batch dimension of each argument, or None for what all samples share.
        args: of the whole batch.
    """
    flat, spec = pytree.tree_flatten(list(args))
    dims = pytree._broadcast_to_and_flatten(list(in_dims), spec)
    assert dims is not None

    def sample(number: int) -> Any:
        one = [a if d is None else _select(a, d, number) for a, d in zip(flat, dims, strict=True)]
        return function(*pytree.tree_unflatten(one, spec))

    def joined(first: Any, *others: Any) -> Any:
        if not isinstance(first, Tensor):
            return first
        return torch.stack([first, *others])[:batch_size]

    # A batch of no samples has the shape of one.
    stacked = pytree.tree_map(joined, *map(sample, range(max(batch_size, 1))))
    return stacked, pytree.tree_map(lambda r: 0 if isinstance(r, Tensor) else None, stacked)


def _select(batch: Tensor, dim: int, number: int) -> Tensor:
    if batch.shape[dim]:
        return batch.select(dim, number)
    return batch.new_zeros([n for d, n in enumerate(batch.shape) if d != dim])


def register(name: str) -> None:
    """Give an operator of dataeff its batching rules: for `vmap`, and for `is_grads_batched`."""
    operator = getattr(torch.ops.dataeff, name)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return in_turn(operator, info.batch_size, in_dims, args)

    def older_rule(*args: Any) -> Any:
        flat, spec = pytree.tree_flatten(list(args))
        level = next(_level(a) for a in flat if _is_older(a))
        given = [torch._remove_batch_dim(a, level, 1, 0) if _is_older(a) else a for a in flat]
        dims = [0 if _is_older(a) else None for a in flat]
        size = next(a.shape[0] for a, d in zip(given, dims, strict=True) if d == 0)
        whole = pytree.tree_unflatten(given, spec)
        found, _ = in_turn(operator, size, pytree.tree_unflatten(dims, spec), tuple(whole))
        return pytree.tree_map(lambda r: torch._add_batch_dim(r, 0, level), found)

    torch.library.register_vmap(f"dataeff::{name}", rule)
    library.impl(name, older_rule, "Batched")


def _is_older(value: Any) -> bool:
    """Whether a value is a batch as `torch.autograd.grad(is_grads_batched=True)` makes them."""
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


def _level(batch: Tensor) -> int:
    """The number by which a batch of the older kind is taken apart.

    The thread that counts them is another one where backward runs on a GPU.
    """
    for level in itertools.count(1):
        if not _is_older(torch._remove_batch_dim(batch, level, 1, 0)):
            return level
    raise AssertionError
