"""A digest of the code behind a layer, for programs that `torch.compile` keeps on disk.

A layer is one operator of a compiled program, and torch finds the program again by its text. What
that operator returns beside its name and arguments follows from the layer's function and from this
compiler, so their digest goes into the text too: a program made before either changed is not found.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from dataeff._version import __version__

_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_KNOWN = ("dataeff.rgnn", "torch")  # whose functions are not gone into
_MOST_VALUES = 10_000  # that are looked at: an object may lead to all that a program holds
_MOST_ELEMENTS = 1000  # of a set or an array whose content is looked at


def digest_of(function: Callable[..., Any], backends: str) -> str:
    """Names the code that decides what the layer of `function` returns on these backends.

    It covers the function, the functions that it calls by a global, closure or module's name, their
    constants and globals (all of a module's, where a function asks for `globals()`), objects with
    all of their state and their classes' functions, small tensors of the CPU and arrays with their
    content, and of others the shapes; not attributes that are read by computed names, nor the state
    of objects that cannot be pickled.
    """
    text = "\n".join((_compiler(), backends, *_Walk(function)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _compiler() -> str:
    """The version, and the sources of the compiler where they are installed."""
    found = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


class _Walk:
    """Texts of a value and of all that it leads to, in an order that is the same everywhere."""

    def __init__(self, value: Any) -> None:
        self.todo: deque[tuple[Any, tuple[str, ...]]] = deque([(value, ())])
        # By id, in the order in which they were met: alive, so that no other value gets their id.
        self.met: dict[int, tuple[int, Any]] = {}
        self.asked: set[tuple[int, tuple[str, ...]]] = set()

    def __iter__(self) -> Iterator[str]:
        for _ in range(_MOST_VALUES):
            if not self.todo:
                return
            yield from self._texts(*self.todo.popleft())

    def _add(self, values: Iterable[Any], names: tuple[str, ...] = ()) -> None:
        self.todo += [(value, names) for value in islice(values, _MOST_VALUES)]

    def _texts(self, value: Any, names: tuple[str, ...]) -> Iterator[str]:
        """What stands for a value of which code asks for these attributes, if any."""
        if isinstance(value, _PLAIN):
            yield f"{type(value).__name__} {value!r}"
            return
        name = getattr(value, "__qualname__", type(value).__qualname__)
        if isinstance(value, (tuple, set, frozenset)):  # equal ones may be one object, or several
            yield f"{name} {len(value)}"
            if isinstance(value, tuple):
                self._add(value, names)
            elif len(value) <= _MOST_ELEMENTS:
                yield from sorted("\n".join(_Walk(item)) for item in value)
            return
        is_new = id(value) not in self.met
        number, _ = self.met.setdefault(id(value), (len(self.met), value))
        yield f"{number} {name}"
        if isinstance(value, (list, dict)):
            yield str(len(value))
            if is_new:
                both = chain(value, value.values()) if isinstance(value, dict) else value
                self._add(both, names)
            return
        if is_new:
            yield from self._inside(value)
        if (id(value), names) not in self.asked and not _is_known(value):
            self.asked.add((id(value), names))
            for name in (*names, "__wrapped__"):  # the latter of what functools.cache made
                self._add([inspect.getattr_static(value, name, None)], names)

    def _inside(self, value: Any) -> Iterator[str]:
        if isinstance(value, CodeType):
            yield from (value.co_code.hex(), *value.co_names, *value.co_varnames)
            yield from value.co_freevars
            self._add(value.co_consts)
        elif isinstance(value, FunctionType):
            if not _is_known(value):
                self._into_function(value)
        elif isinstance(value, type):
            self._into_class(value)
        elif not isinstance(value, ModuleType):
            yield from self._state(value)
            self._into_class(type(value))

    def _into_function(self, function: FunctionType) -> None:
        names = tuple(_names(function.__code__))
        self._add((function.__code__, function.__defaults__, function.__kwdefaults__))
        known = function.__globals__
        found = {name: known[name] for name in names if name in known}
        if "globals" in names and "globals" not in known:
            found |= {name: each for name, each in known.items() if not name.startswith("__")}
        cells = function.__closure__ or ()
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
            with suppress(ValueError):  # a name that has no value yet
                found[name] = cell.cell_contents
        for name, value in found.items():
            self._add((name,))
            self._add((value,), names)

    def _into_class(self, found: type) -> None:
        """The functions of a class and of those that it inherits from."""
        for each in found.__mro__:
            if _is_known(each) or each.__module__.partition(".")[0] in sys.stdlib_module_names:
                continue
            for name, member in vars(each).items():
                member = getattr(member, "fget", member)  # of a property
                member = getattr(member, "__func__", member)
                if isinstance(member, FunctionType):
                    self._add((name, member))

    def _state(self, value: Any) -> Iterator[str]:
        """What an object holds, as it would be pickled; of tensors and large arrays the shape."""
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            yield f"{value.dtype} {tuple(value.shape)}"
            if math.prod(value.shape) > _MOST_ELEMENTS:
                return
            if isinstance(value, Tensor):
                if type(value) in (Tensor, Parameter) and value.device.type == "cpu":
                    with suppress(Exception):  # sparse ones, and any in a mode that makes fake ones
                        yield repr(value.detach().tolist())
                return
        if type(value).__module__.startswith("dataeff."):
            return
        with suppress(Exception):  # objects may refuse to be pickled in any way
            state = value.__reduce_ex__(2)
            self._add(state[1:] if isinstance(state, tuple) else (state,))


def _is_known(value: Any) -> bool:
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return f"{module}.".startswith(tuple(f"{known}." for known in _KNOWN))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
