"""Forwards of blocks that are run another way for a while: recomputed, or watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Run = Callable[..., Any]  # run(forward, *args, **kwargs)


class Forwards:
    """What is wrapped around the forwards of blocks, until `give_back`."""

    def __init__(self) -> None:
        self._wrapped: list[tuple[torch.nn.Module, str, Any]] = []

    def wrap(self, block: torch.nn.Module, run: Run) -> None:
        """Has `run(forward, *args, **kwargs)` called for the block's forward."""
        # A block compiled in place would be compiled anew, with what is wrapped around its forward.
        in_place = getattr(block, "_compiled_call_impl", None) is not None
        name = "_compiled_call_impl" if in_place else "forward"
        own = vars(block).get(name)
        self._wrapped.append((block, name, own))  # first: an interrupt may come between the two
        setattr(block, name, _Forward(block, name, own, run))

    def give_back(self) -> None:
        """Gives the blocks their own forwards back."""
        while self._wrapped:
            block, name, own = self._wrapped[-1]
            if own is None:
                vars(block).pop(name, None)
            else:
                setattr(block, name, own)
            self._wrapped.pop()


class _Forward:
    """The forward of a block, called by `run`.

    An attribute of the block, so what copies the block in the middle of a step (averaged weights,
    say) copies it too: the copy has the forward that it would have without, and not this one, which
    computes with the parameters of the block.
    """

    def __init__(self, block: torch.nn.Module, name: str, own: Any, run: Run) -> None:
        self._block, self._name, self._own, self._run = block, name, own, run
        self._forward = getattr(block, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._forward, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self._own is None:
            return getattr, (self._block, self._name)  # of the copy, which is made by now
        return _own, (self._own,)


def _own(forward: Any) -> Any:
    return forward
