"""Which backend runs a program: C++ on CPU, Triton on GPU, or the reference interpreter.

`DATAEFF_RGNN_BACKEND` (auto, reference, cpp or triton) overrides the choice, for tests and for
finding out whether a backend is at fault.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection
from functools import cache, partial

import torch
from torch import Tensor

from dataeff.rgnn.cpp import backend as cpp_backend
from dataeff.rgnn.cpp.toolchain import CompilerMissing
from dataeff.rgnn.execute import Executor
from dataeff.rgnn.interpret import interpret
from dataeff.rgnn.ir import Program
from dataeff.rgnn.kernels_ir import Schedule
from dataeff.rgnn.lower import lower
from dataeff.rgnn.products import NativeProducts
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.view import View
from dataeff.rgnn.wide_scores import dtype_in, wide_scores

Run = Callable[[View, dict[str, Tensor]], list[Tensor]]
BACKENDS = ("auto", "reference", "cpp", "triton")


class Runner:
    """One program on one backend; kernels are compiled at the first run.

    Args:
        program: what to run.
        dtype: of its values.
        device: device type, which chooses the backend unless one is named.
        backend: `reference`, `cpp` or `triton`.
        choice: sizes that tuning chose.
        sizes: rows of each domain, by which the steps are ordered.
        disabled: what is left out, of "fuse" and "memory_plan".
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype,
        device: str,
        backend: str | None = None,
        choice: Choice | None = None,
        sizes: tuple[int, ...] | None = None,
        disabled: Collection[str] = (),
    ) -> None:
        self.choice = choice or Choice()
        self.program = program
        self.dtype = dtype
        self.wide = wide_scores(program)
        self.name = backend or choose(device)
        self.schedule: Schedule | None = None
        if self.name != "reference":
            order = None if "memory_plan" in disabled else sizes
            fuse, scatter = "fuse" not in disabled, self.name == "cpp"
            self.schedule = lower(program, self._dense(), order, fuse=fuse, scatter=scatter)
        self._compiled: dict[torch.dtype, Run] = {}

    def _dense(self) -> tuple[str, ...]:
        if self.name != "triton":
            return ()
        from dataeff.rgnn.triton.backend import DENSE_KINDS

        return DENSE_KINDS

    def __call__(self, view: View, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Outputs of the program, each in its dtype."""
        index = view.graph.structure.dtype
        if index not in self._compiled:
            self._compiled[index] = self._compile(index)
        found = self._compiled[index](view, inputs)
        outputs = self.program.outputs
        return [v.to(self.dtype_of(o)) for v, o in zip(found, outputs, strict=True)]

    def dtype_of(self, value: int) -> torch.dtype:
        """The dtype of a value: that of the program, but for scores of a softmax."""
        return dtype_in(self.dtype, value in self.wide)

    def _compile(self, index: torch.dtype) -> Run:
        if self.schedule is None:
            return partial(interpret, self.program)
        if self.name == "triton":
            from dataeff.rgnn.triton.backend import TritonTraversals

            on_gpu = TritonTraversals(self.schedule, self.dtype, self.choice)
            return Executor(self.schedule, on_gpu, self.choice)
        native = cpp_backend.supports(self.dtype)
        dtype, parts = self.dtype if native else torch.float32, self.choice.parts_per_thread
        try:
            traversals = cpp_backend.CppTraversals(self.schedule, dtype, index, parts)
            products = NativeProducts(self.schedule, dtype, index)
            run = Executor(self.schedule, traversals, self.choice, products)
            return run if native else partial(_in_float32, run)
        except CompilerMissing as error:
            _warn_once(str(error))
            return partial(interpret, self.program)

    def sources(self) -> str:
        """The generated code of every traversal."""
        if self.schedule is None:
            return ""
        if self.name == "triton":
            from dataeff.rgnn.triton import backend as triton_backend

            return triton_backend.generate(self.schedule, self.dtype, self.choice)
        dtype = self.dtype if cpp_backend.supports(self.dtype) else torch.float32
        return cpp_backend.generate(self.schedule, dtype, torch.int32)


def choose(device: str) -> str:
    """The backend for a device type."""
    wish = os.environ.get("DATAEFF_RGNN_BACKEND", "auto")
    if wish not in BACKENDS:
        raise ValueError(f"DATAEFF_RGNN_BACKEND is {wish!r}; it must be one of {BACKENDS}")
    if wish != "auto":
        return wish
    return {"cpu": "cpp", "cuda": "triton"}.get(device, "reference")


def _in_float32(run: Run, view: View, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Half precision on CPU: rows are widened once, and every sum is in float32."""
    return run(view, {name: tensor.float() for name, tensor in inputs.items()})


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
