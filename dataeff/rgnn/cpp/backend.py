"""The CPU backend: traversals as generated C++, compiled once by content.

Products are C++ as well (`cpp.gemm`); ATen makes those of half precision: see `gemm_cpu`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dataeff.rgnn.cpp.prelude import prelude
from dataeff.rgnn.cpp.source import KernelSource, traversal_source
from dataeff.rgnn.cpp.toolchain import PARALLEL_HEADER, compile_cpp
from dataeff.rgnn.domains import map_source
from dataeff.rgnn.kernels_ir import Schedule, Traversal
from dataeff.rgnn.structure import CONTIGUOUS
from dataeff.rgnn.view import View

# A product fused with the subtraction of a maximum is not the product whose maximum it is, which
# takes three digits from the softmax of scores of 1e4.
FLAGS = ("-ffp-contract=off",)

# Traversals of fewer elements are walked by one thread: it takes no longer than to wake another,
# and on a busy machine that may be milliseconds away.
FEW_ELEMENTS = 1 << 14

_SCALARS = {torch.float32: "float", torch.float64: "double"}


def supports(dtype: torch.dtype) -> bool:
    """Whether generated C++ computes in this dtype."""
    return dtype in _SCALARS


def generate(schedule: Schedule, dtype: torch.dtype, index: torch.dtype) -> str:
    """The generated functions of a schedule, without the parallel loop they call."""
    text = prelude(_SCALARS[dtype], "int32_t" if index == torch.int32 else "int64_t")
    return text + "\n".join(s.text for s in _sources(schedule).values())


def _sources(schedule: Schedule) -> dict[int, KernelSource]:
    return {
        number: traversal_source(schedule, number, lambda m: m not in CONTIGUOUS)
        for number, step in enumerate(schedule.steps)
        if isinstance(step, Traversal)
    }


def _width(schedule: Schedule, number: int) -> int:
    """Elements of the widest row that a traversal reads or stores."""
    step = schedule.steps[number]
    values = schedule.reads(step) | set(schedule.kept(number))
    return max((schedule.program[v].type.numel for v in values), default=1)


class CppTraversals:
    """The compiled traversals of one schedule.

    Args:
        schedule: what holds the traversals.
        dtype: of values.
        index: of indices.
        parts_per_thread: pieces that rows are handed to each thread in.

    Raises:
        CompilerMissing: there is no C++ compiler.
    """

    def __init__(
        self,
        schedule: Schedule,
        dtype: torch.dtype,
        index: torch.dtype,
        parts_per_thread: int = 16,
    ) -> None:
        self.parts_per_thread = parts_per_thread
        self.sources = _sources(schedule)
        self.widths = {n: _width(schedule, n) for n in self.sources}
        text = PARALLEL_HEADER + generate(schedule, dtype, index)
        self.library = compile_cpp(text, flags=FLAGS)

    def __call__(
        self, number: int, kernel: Traversal, view: View, values: dict[int, Tensor]
    ) -> None:
        """Run one traversal."""
        source = self.sources[number]
        tensors = view.arguments(source.arguments, values)
        pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        rows = inside = view.num_rows(kernel.center)
        if kernel.map is not None:
            inside = view.num_rows(map_source(kernel.map))
        few = max(rows, inside) * self.widths[number] < FEW_ELEMENTS
        threads = 1 if few else torch.get_num_threads()
        grain = max(1, -(-rows // (threads * self.parts_per_thread)))
        function = getattr(self.library, source.name)
        function(pointers, ctypes.c_int64(rows), ctypes.c_int64(grain), ctypes.c_int64(threads))
