"""The hooks on saved tensors that are in force on a thread, as torch keeps them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

_autograd = torch._C._autograd
_all: weakref.WeakSet[HookStack] = weakref.WeakSet()


class HookStack:
    """Puts a pair of hooks into force and takes it out again.

    Torch's own list says which hooks are in force: with another one beside it, an interrupt between
    the two changes would leave them at odds.

    Args:
        pack: is given each tensor that autograd saves; what it returns is kept instead.
        unpack: is given that when backward wants the tensor.
    """

    def __init__(self, pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
        self.pack, self.unpack = pack, unpack
        self._pack, self._unpack = pack, unpack
        self._untraced = False
        _all.add(self)

    @property
    def on_top(self) -> bool:
        """Whether this thread's saved tensors go through these hooks."""
        hooks = _top()
        return hooks is not None and hooks[1] in (self._unpack, self.unpack)

    def push(self) -> None:
        """From here on this thread's saved tensors go through the hooks."""
        if "torch._dynamo" in sys.modules and not self._untraced:
            # After a graph break, dynamo would trace the hooks too.
            self._untraced = True
            self._pack = torch.compiler.disable(self._pack)
            self._unpack = torch.compiler.disable(self._unpack)
        _autograd._push_saved_tensors_default_hooks(self._pack, self._unpack)

    def pop(self) -> bool:
        """Takes the hooks from the top, as often as they lie there; whether they did."""
        found = self.on_top
        while self.on_top:
            _autograd._pop_saved_tensors_default_hooks()
        return found

    def pull(self) -> None:
        """Takes the hooks away from under others that were pushed later and are still in force.

        Blocks that begin and end in the callbacks of a trainer end in the order in which they
        began.
        """
        above: list[Any] = []
        try:
            while not self.pop() and (hooks := _top()) is not None:
                above.append(hooks)
                _autograd._pop_saved_tensors_default_hooks()
        finally:
            while above:
                _autograd._push_saved_tensors_default_hooks(*above.pop())


def in_force() -> HookStack | None:
    """The stack whose hooks this thread's saved tensors go through now, if they go through any."""
    return next((stack for stack in list(_all) if stack.on_top), None)


def _top() -> Any:
    return _autograd._top_saved_tensors_default_hooks(True)
