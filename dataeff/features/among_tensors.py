"""A table where a tensor is expected: its rows as one, or what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.overrides import resolve_name

_ROWS = "table[index] gathers rows and table[:] all of them"


class AmongTensors:
    """What PyTorch, NumPy and Python ask of a table as of a tensor.

    `torch.as_tensor(table)` and `numpy.asarray(table)` are all of its rows, gathered; a function of
    PyTorch takes no table, and is not to go through its rows one by one.
    """

    if TYPE_CHECKING:  # the table's own

        def __getitem__(self, selection: Any) -> Tensor: ...

    def __dlpack__(self, **options: Any) -> Any:
        return self[:].__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return torch.empty(0, device="cpu").__dlpack_device__()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("a table's rows are gathered into a new array: copy=None")
        rows = self[:].numpy()
        return rows if dtype is None else rows.astype(dtype, copy=False)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> NoReturn:
        """Names the function and what it takes."""
        name = resolve_name(func) or getattr(func, "__name__", "this function")
        raise TypeError(
            f"{name} takes tensors, not a {cls.__name__}: {_ROWS}; "
            "dataeff.unified(x) is a tensor that PyTorch's functions take"
        )

    def _no_operand(self, other: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is no operand: {_ROWS}")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no_operand
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _no_operand
    __lt__ = __le__ = __gt__ = __ge__ = _no_operand

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Tensor):  # which would be False without a word
            self._no_operand(other)
        return self is other

    __hash__ = object.__hash__

    def __contains__(self, value: object) -> NoReturn:
        raise TypeError("a table is not searched for a value: (table[:] == value).any()")

    def __setitem__(self, selection: Any, rows: Any) -> NoReturn:
        raise TypeError(
            "rows are written by number: table.scatter_(index, rows), index an int32 or int64 "
            "tensor and rows one of shape [*index.shape, *table.shape[1:]]"
        )

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        if not name.startswith("_") and hasattr(Tensor, name):
            raise AttributeError(f"a {kind} has no {name!r}, which tensors have: {_ROWS}")
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")
