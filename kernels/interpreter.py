"""Runs Triton kernels on CPU tensors, inside a block of code.

`TRITON_INTERPRET=1` decides once per process, when a kernel is decorated, and Triton's own library
functions (`tl.sum`, `tl.max`, ...) must have been decorated under it too. `interpreted()` swaps
both for a block instead, so that one process can interpret a kernel and compile it as well:

    with interpreter.interpreted(typed_gemm):      # modules that hold @triton.jit functions
        typed_gemm.kernel[grid](cpu_tensor, ...)
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.experimental.gluon  # noqa: F401  (asserts on import that tl.* is not interpreted)
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

_LANGUAGE = (tl, tl.core, tl.math, tl.random, tl.standard)


def _patched_places() -> list[Any]:
    """Everything the interpreter rebinds names in: the language's modules and their classes."""
    classes = [value for value in vars(tl.core).values() if isinstance(value, type)]
    own = [cls for cls in classes if cls.__module__.startswith("triton.language")]
    return [*_LANGUAGE, *own]


_dot = InterpreterBuilder.create_dot


def _dot_of_values(self: Any, a: Any, b: Any, *args: Any) -> Any:
    """A dot that knows bfloat16: the interpreter's own multiplies the bit patterns (3.6 to 3.9)."""
    return _dot(self, _widen(a), _widen(b), *args)


def _widen(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    values = (operand.data.astype(np.uint32) << 16).view(np.float32)
    return TensorHandle(values, tl.float32)


_patch_lang_tensor = triton_interpreter._patch_lang_tensor


def _patch_lang_tensor_for_numpy(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes an index of an array of one element, which NumPy 2.4 refuses."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_patch_lang = triton_interpreter._patch_lang


class _PatchedLanguage:
    """Patches the language for the interpreter once, and leaves it so.

    Triton does so at each launch and at each call of a device function, for milliseconds.
    """

    def __init__(self) -> None:
        self._known: set[tuple[int, ...]] = set()

    def __call__(self, fn: Any) -> _PatchedLanguage:
        """What `_patch_lang` does for a kernel or device function that uses these modules."""
        modules = tuple(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if modules not in self._known:
            _patch_lang(fn)
            self._known.add(modules)
        return self

    def restore(self) -> None:
        """Nothing: `interpreted` puts back what was before."""


def _restore(place: Any, before: dict[str, Any]) -> None:
    for name, value in list(vars(place).items()):
        if name in before:
            if before[name] is not value:
                setattr(place, name, before[name])
        elif isinstance(place, type):
            # Names added to a module stay: kernels rewritten for the interpreter refer to them.
            delattr(place, name)


@contextlib.contextmanager
def interpreted(*modules: types.ModuleType) -> Iterator[None]:
    """Makes the `@triton.jit` functions of these modules run in Triton's interpreter.

    Calls to device functions leave the language patched behind them (seen in Triton 3.6 and 3.9),
    which would break the next compilation, so everything is put back from a copy.
    """
    places = [*_patched_places(), InterpreterBuilder, triton_interpreter, *modules]
    saved = [(place, dict(vars(place))) for place in places]
    try:
        for module in (*_LANGUAGE, *modules):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    setattr(module, name, InterpretedFunction(value.fn))
        InterpreterBuilder.create_dot = _dot_of_values
        triton_interpreter._patch_lang_tensor = _patch_lang_tensor_for_numpy
        triton_interpreter._patch_lang = _PatchedLanguage()
        with np.errstate(all="ignore"):  # a GPU does not warn of inf and nan either
            yield
    finally:
        for place, before in saved:
            _restore(place, before)


def is_interpreted(kernel: object) -> bool:
    """Whether launching this kernel takes CPU tensors: by `interpreted()` or TRITON_INTERPRET=1."""
    return isinstance(kernel, InterpretedFunction)
