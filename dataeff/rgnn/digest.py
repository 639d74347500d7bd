"""A digest of the code behind a layer, for programs that `torch.compile` keeps on disk.

A layer is one operator of a compiled program, and torch finds the program again by its text. What
that operator returns beside its name and arguments follows from the layer's function and from this
compiler, so their digest goes into the text too: a program made before either changed is not found.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from dataeff._version import __version__

_PLAIN = (str, bytes, int, float, complex, bool, type(None))
_KNOWN = ("dataeff.rgnn", "torch")  # whose functions are not gone into


def digest_of(function: Callable[..., Any], backends: str) -> str:
    """Names the code that decides what the layer of `function` returns on these backends.

    It covers the function, the functions that it calls by a global, closure or module's name, and
    their constants and globals of plain types; not what it reads off objects by computed names.
    """
    text = "\n".join((_compiler(), backends, *_parts(function, (), set())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _compiler() -> str:
    """The version, and the sources of the compiler where they are installed."""
    found = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _parts(value: Any, names: tuple[str, ...], seen: set[int]) -> Iterator[str]:
    """What stands for a value of which code asks for these attributes, if any."""
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item, names, seen)
    elif isinstance(value, dict):
        yield from _parts([*value.items()], names, seen)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(part for item in value for part in _parts(item, names, seen))
    elif isinstance(value, CodeType):
        yield from (value.co_code.hex(), *value.co_names, *value.co_varnames, *value.co_freevars)
        yield from _parts(value.co_consts, names, seen)
    else:
        yield getattr(value, "__qualname__", type(value).__qualname__)
        if id(value) in seen or _is_known(value):
            return
        seen.add(id(value))
        yield from _of_function(value, seen) if isinstance(value, FunctionType) else ()
        for name in (*names, "__wrapped__"):  # the latter of what functools.cache made
            attribute = inspect.getattr_static(value, name, None)
            yield from _parts(attribute, names, seen)


def _is_known(value: Any) -> bool:
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return f"{module}.".startswith(tuple(f"{known}." for known in _KNOWN))


def _of_function(function: FunctionType, seen: set[int]) -> Iterator[str]:
    names = tuple(_names(function.__code__))
    for value in (function.__code__, function.__defaults__, function.__kwdefaults__):
        yield from _parts(value, (), seen)
    found = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a name that has no value yet
            found[name] = cell.cell_contents
    for name, value in found.items():
        yield name
        yield from _parts(value, names, seen)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
