"""The GPU backend: traversals as generated Triton. On CPU tensors they run in its interpreter."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dataeff.memory.cuda import current_device
from dataeff.rgnn.aot import load_kernels
from dataeff.rgnn.kernels_ir import Schedule, Traversal
from dataeff.rgnn.long_rows import Pieces
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.structure import CONTIGUOUS
from dataeff.rgnn.triton.hubs import HubKernels
from dataeff.rgnn.triton.prelude import PRELUDE
from dataeff.rgnn.triton.source import FP_FUSION, MAX_REGISTERS, TritonKernel, traversal_kernel
from dataeff.rgnn.view import View

# Values whose rows change shape are stored and viewed, since a padded block cannot be reshaped.
DENSE_KINDS = ("reshape", "concat", "slice", "embed")

# Programs that long rows are shared out to. Only the device knows how many rows are long: as many
# programs as there may be (130 thousand for 17 million edges) would mostly start and end. So many
# are some times what the largest GPUs run at once, which evens out rows of different lengths.
MOST_PROGRAMS = 2048


def kernels(
    schedule: Schedule, dtype: torch.dtype, choice: Choice | None = None
) -> dict[int, TritonKernel]:
    """The generated kernel of each traversal, by step number, in the sizes of a choice."""
    double = dtype == torch.float64
    return {
        number: traversal_kernel(schedule, number, CONTIGUOUS, double, choice)
        for number, step in enumerate(schedule.steps)
        if isinstance(step, Traversal)
    }


def generate(schedule: Schedule, dtype: torch.dtype, choice: Choice | None = None) -> str:
    """The generated module of a schedule."""
    return PRELUDE + "\n".join(k.text for k in kernels(schedule, dtype, choice).values())


class TritonTraversals:
    """The traversals of one schedule, compiled by Triton at their first launch."""

    def __init__(
        self, schedule: Schedule, dtype: torch.dtype, choice: Choice | None = None
    ) -> None:
        self.double = dtype == torch.float64
        self.kernels = kernels(schedule, dtype, choice)
        text = generate(schedule, dtype, choice)
        self.module = load_kernels(text) if self.kernels else None

    def __call__(
        self, number: int, kernel: Traversal, view: View, values: dict[int, Tensor]
    ) -> None:
        """Run one traversal."""
        generated = self.kernels[number]
        rows = view.num_rows(kernel.center)
        if rows == 0:
            return
        tensors = view.arguments(generated.arguments, values)
        options = {"maxnreg": MAX_REGISTERS, "enable_fp_fusion": FP_FUSION}
        with _launching_on(view.device, self.module):
            launch: Any = getattr(self.module, generated.name)
            grid = (-(-rows // generated.rows_per_program),)
            launch[grid](*tensors, rows, num_warps=generated.num_warps, **options)
            if generated.map is None or generated.hubs is None:
                return
            options["num_warps"], structure = generated.long_warps, view.graph.structure
            long = structure.long_rows(generated.map, generated.long_row, generated.hub)
            if long is not None:
                launch = getattr(self.module, f"{generated.name}_long")
                programs = min(long.rows.numel(), MOST_PROGRAMS)
                launch[(programs,)](long.rows, long.count, *tensors, rows, **options)
            pieces = structure.hubs(generated.map, generated.hub)
            if pieces is not None:
                parts = self._parts(pieces, generated.hubs)
                for name in generated.hubs.names:
                    launch = getattr(self.module, name)
                    launch[pieces.rows.shape](
                        pieces.rows, pieces.first, parts, *tensors, rows, **options
                    )

    def _parts(self, pieces: Pieces, hubs: HubKernels) -> Tensor:
        """What pieces leave to each other."""
        dtype = torch.float64 if self.double else torch.float32
        return pieces.rows.new_empty(pieces.rows.numel(), hubs.width, dtype=dtype)


def _launching_on(
    device: torch.device, module: ModuleType | None
) -> contextlib.AbstractContextManager[Any]:
    assert module is not None  # there is a traversal to run
    if device.type != "cpu":
        return current_device(device)
    from dataeff.kernels.interpreter import interpreted

    interpreter: contextlib.AbstractContextManager[None] = interpreted(module)
    return interpreter
