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

from dataeff.offload.identity import VersionProbe
from dataeff.offload.kinds import is_plain

T = TypeVar("T")

_PLAIN = (torch.Tensor, torch.nn.Parameter)
TRANSFORM = "a transform"


def checkpoint(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Runs `function(*args, **kwargs)` without keeping what it saves; backward runs it again.

    `torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)`, but every
    tensor in the arguments, however deep in tuples, lists and dicts, is handed over positionally:
    inside `with offload:` the inputs of the block go to the offload's tiers, and nothing else is
    held. What is bound into `function` itself cannot be seen. Lists and dicts are made anew for
    `function`: what it adds to one the caller does not see.
    """
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if _is_handed_over(leaf)]
    tensors = [leaves[i] for i in places]
    others = [None if _is_handed_over(leaf) else leaf for leaf in leaves]

    def run(*given: torch.Tensor) -> T:
        filled = list(others)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        again_args, again_kwargs = tree_unflatten(filled, spec)
        return function(*again_args, **again_kwargs)

    result: T = torch_checkpoint(run, *tensors, use_reentrant=False)
    return result


def _is_handed_over(leaf: Any) -> bool:
    """A tensor, but no nested one that is not jagged: torch 2.11's checkpoint fails at those."""
    if not isinstance(leaf, torch.Tensor):
        return False
    return not (leaf.is_nested and leaf.layout == torch.strided)


class Changes:
    """Notices which blocks cannot be run again, because what they are given does not stay as it is.

    A block that adds keys and values to a cache that it is called with, or moves running statistics
    on, would do so twice. One that only reads such a cache would read more than the first time, if
    another block adds to it later. What is looked at are arguments and buffers, and whether the
    block runs inside a transform of `torch.func`, which backward is outside of.
    """

    def __init__(self) -> None:
        self._given: list[tuple[str, Any, object]] = []  # what it was when the block was called
        self._transformed: dict[str, str] = {}

    def watching(self, name: str, block: torch.nn.Module) -> Callable[..., Any]:
        """`run(forward, *args, **kwargs)`, which notes what the block `name` is called with."""

        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                if torch._C._functorch.peek_interpreter_stack() is not None:
                    self._transformed[name] = TRANSFORM
                for value in (*args, *kwargs.values(), *block.buffers()):
                    self._note(name, value)
            return forward(*args, **kwargs)

        return run

    def _note(self, name: str, value: Any) -> None:
        if type(value) in _PLAIN and is_plain(value):
            probe = VersionProbe(value)  # holds none of its memory
            self._given.append((name, probe, probe.version))
        elif not isinstance(value, (bool, int, float, complex, str, type(None))):
            self._given.append((name, value, state_of(value)))

    def found(self) -> dict[str, str]:
        """The blocks that cannot be run again, and why: the kind of the first thing that changed.

        `TRANSFORM` for those that ran inside one.
        """
        changed = dict(self._transformed)
        for name, value, before in self._given:
            probed = isinstance(value, VersionProbe)
            if before != (value.current if probed else state_of(value)):
                changed.setdefault(name, "Tensor" if probed else type(value).__name__)
        self.forget()
        return changed

    def forget(self) -> None:
        """Lets go of what was noted."""
        self._given.clear()
        self._transformed.clear()


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
