"""A hook that a copy of its module does not inherit.

`copy.deepcopy(model)` (averaged weights, say) copies the hooks of the model with it, and what they
refer to; `torch.save(model)` pickles them. A hook of an offload belongs to one model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ModuleHook:
    """Calls `function`; a copy of it, or what is unpickled, does nothing.

    Args:
        function: takes what the hook of a module is given.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        return self._function(*args)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _nothing, ()


def _nothing() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return None
