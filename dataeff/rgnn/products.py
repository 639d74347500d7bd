"""The typed products of a schedule as compiled C++, with little between one call and the next.

`gemm.typed_gemm` asks of every call whether shapes, strides, dtypes, devices and segments fit, and
makes views with an axis of heads. Of a program on a graph all of it is known, so that what C++ is
told is made once for each product, but for addresses and numbers of rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dataeff.rgnn.cpp import gemm as gemm_native
from dataeff.rgnn.cpp.gemm_source import Arguments
from dataeff.rgnn.kernels_ir import Gemm, Schedule
from dataeff.rgnn.structure import TypedRows

# Products of fewer operations are made by one thread: they take no longer than to wake another, and
# on a busy machine that may be milliseconds away.
FEW_FLOPS = 1 << 19


@dataclass(frozen=True)
class _Known:
    """What a product is told in every call.

    Attributes:
        entry: the function.
        fixed: its arguments, with sizes and strides of rows.
        width: elements of a row of the result.
        flops: operations for each row.
        size: elements of a weight's gradient.
    """

    entry: str
    fixed: Arguments
    width: int
    flops: int
    size: int


class NativeProducts:
    """The products of one schedule; operands and results are contiguous, in one dtype.

    Args:
        schedule: what holds the products.
        dtype: of values, one that C++ computes in.
        index: of maps.
    """

    def __init__(self, schedule: Schedule, dtype: torch.dtype, index: torch.dtype) -> None:
        self.library = gemm_native.library_for(dtype, index)
        self.index = index
        steps = enumerate(schedule.steps)
        self._known = {n: _known(schedule, step) for n, step in steps if isinstance(step, Gemm)}

    def take(self, types: TypedRows, gather: Tensor | None, *operands: Tensor) -> bool:
        """Whether a product of these runs here: rows that stand by type, nothing strided."""
        return (
            self.library is not None
            and types.order is None
            and (gather is None or gather.dtype == self.index)
            and all(map(Tensor.is_contiguous, operands))
        )

    def __call__(
        self,
        number: int,
        rows: Tensor,
        other: Tensor,
        out: Tensor,
        types: TypedRows,
        gather: Tensor | None,
        target: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """Run the product of step `number`.

        Args:
            number: the step.
            rows: what `gather` picks rows from.
            other: weights by type, or of a weight gradient the other rows.
            out: memory for the result; `rows` themselves for a product that overwrites them.
            types: the rows by type, in the order in which they stand.
            gather: the row of `rows` behind each row.
            target: the row of `out` that each row is added to.
            add: keep what `out` holds.
        """
        known = self._known[number]
        a = Arguments.from_buffer_copy(known.fixed)
        num_rows = rows.shape[0] if gather is None else gather.shape[0]
        bounds = types.bounds
        bad = ctypes.c_int64(-1)
        a.x, a.weight, a.y = rows.data_ptr(), other.data_ptr(), out.data_ptr()
        a.seg_ptr, a.bad = bounds.data_ptr(), ctypes.addressof(bad)
        a.num_rows, a.num_source, a.num_types = num_rows, rows.shape[0], bounds.shape[0] - 1
        few = num_rows * known.flops < FEW_FLOPS
        a.num_threads = 1 if few else torch.get_num_threads()
        if gather is not None:
            a.gather = gather.data_ptr()
        if target is not None:
            a.target, a.num_sums, a.add = target.data_ptr(), out.shape[0], int(add)
        if known.size:
            a.chunk = gemm_native.chunk_rows(num_rows)
            extra = rows.new_empty(max(num_rows - 1, 0) // a.chunk, known.size)
            a.extra = extra.data_ptr()
        getattr(self.library, known.entry)(ctypes.byref(a))
        if bad.value >= 0 and gather is not None:
            raise gemm_native.outside(int(gather[bad.value]), rows)


def _known(schedule: Schedule, step: Gemm) -> _Known:
    op = schedule.product(step)
    left, right = (schedule.program[a].type.shape for a in op.args)
    if op.kind == "outer":
        heads, num_in = prod(left[:-1]), left[-1]
        num_out = prod(right) // heads if heads else 0
        strides = {"w_in": heads * num_out, "w_head": num_out}
        entry, width = "typed_gemm_dw", heads * num_in * num_out
    else:
        batch = len(op.type.shape) - 1 if op.kind == "linear_t" else len(left) - 1
        heads, first, last = prod(right[:batch]), right[batch], prod(right[batch + 1 :])
        num_in, num_out = (last, first) if op.kind == "linear_t" else (first, last)
        w_in, w_out = (1, last) if op.kind == "linear_t" else (last, 1)
        strides = {
            **{"w_type": heads * first * last, "w_head": first * last},
            **{"w_in": w_in, "w_out": w_out, "y_row": heads * num_out, "y_head": num_out},
        }
        entry = "typed_gemm" if step.scatter is None else "typed_gemm_sum"
        width = heads * num_out
    sizes = {"num_heads": heads, "num_in": num_in, "num_out": num_out}
    fixed = Arguments(x_row=heads * num_in, x_head=num_in, **sizes, **strides)
    size = width if op.kind == "outer" else 0
    return _Known(entry, fixed, width, 2 * heads * num_in * num_out, size)
