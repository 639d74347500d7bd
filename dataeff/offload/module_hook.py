"""A hook that neither a copy of its module inherits nor a compiled graph of it.

`copy.deepcopy(model)` (averaged weights, say) copies the hooks of the model with it, and what they
refer to; `torch.save(model)` pickles them. A hook of an offload belongs to one model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class ModuleHook:
    """Calls `function`; a copy of it, or what is unpickled, does nothing, as while dynamo traces.

    What is compiled around a module (by a trainer, say) would be cut in two at each hook, and
    round otherwise than without.

    Args:
        function: takes what the hook of a module is given.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """What the function returns; None in a compiled graph."""
        if torch.compiler.is_compiling():
            return None
        return self._function(*args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return None
