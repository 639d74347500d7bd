"""Recomputation whose inputs an offload can see.

`torch.utils.checkpoint` packs the tensors among its *positional* arguments through the hooks that
are active around it; tensors in keyword arguments, in tuples or lists, or bound by
`functools.partial` are held by a closure that no hook sees, and stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint as torch_checkpoint

T = TypeVar("T")


def checkpoint(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Runs `function(*args, **kwargs)` without keeping what it saves; backward runs it again.

    `torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)`, but every
    tensor in the arguments, however deep in tuples, lists and dicts, is handed over positionally:
    inside `with offload:` the inputs of the block go to the offload's tiers, and nothing else is
    held. What is bound into `function` itself cannot be seen. Lists and dicts are made anew for
    `function`: what it adds to one the caller does not see.
    """
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    tensors = [leaves[i] for i in places]
    others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

    def run(*given: torch.Tensor) -> T:
        filled = list(others)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        again_args, again_kwargs = tree_unflatten(filled, spec)
        return function(*again_args, **again_kwargs)

    result: T = torch_checkpoint(run, *tensors, use_reentrant=False)
    return result


def state_of(value: Any, depth: int = 8) -> object:
    """Compares equal after a call that changed nothing within `value`.

    What a block changes in its arguments (keys and values that it adds to a cache, say) it would
    change again if it were recomputed.
    """
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if depth == 0 or isinstance(value, (torch.nn.Module, type)):
        return id(value)
    if isinstance(value, dict):
        return {key: state_of(part, depth - 1) for key, part in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [state_of(part, depth - 1) for part in value]
    if isinstance(value, (bool, int, float, complex, str)):
        return value
    return id(value), state_of(getattr(value, "__dict__", {}), depth - 1)
