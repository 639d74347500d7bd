"""Compiles a layer's kernels ahead of time, for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from dataeff.rgnn.aot import KernelReport, compile_kernel, load_kernels
from dataeff.rgnn.kernels_ir import Gemm, Schedule, Traversal
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.schedule import GemmSchedule, dw_schedule, gemm_schedule
from dataeff.rgnn.triton_source import BLOCK_ELEMENTS, MAX_REGISTERS

if TYPE_CHECKING:
    from dataeff.rgnn.layer import Layer

TARGETS = ("sm_80", "sm_90", "sm_100")

TRITON_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


@dataclass(frozen=True)
class StepReport:
    """One kernel of a layer: in which direction it runs, what it does, what it uses."""

    direction: str
    work: str
    kernel: KernelReport


def layer_reports(
    layer: Layer,
    shapes: Mapping[str, tuple[int, ...]],
    sizes: tuple[int, ...],
    statics: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    target: str = "sm_90",
    precision: str = "ieee",
    typed: bool = False,
    elements: int = BLOCK_ELEMENTS,
) -> Iterator[StepReport]:
    """Compiles every kernel of a layer's forward and backward for `target`, one after another.

    Args:
        layer: the layer.
        shapes: shape of each tensor argument, by name.
        sizes: rows of each domain of the graph, in the order of `rgnn.Graph.sizes`.
        statics: its other arguments.
        dtype: of all tensors.
        target: `sm_80`, `sm_90`, `sm_100`, ...
        precision: of float32 products, `ieee` or `tf32`.
        typed: for graphs made of edges by type (`rgnn.Graph.from_typed`).
        elements: of the widest value that a traversal holds at a time, as `rgnn.tune` chooses it.
    """
    spec = spec_of(tuple(shapes), tuple((statics or {}).items()), typed=typed)
    wanted = (1 << len(shapes)) - 1
    request = Request(layer.id, spec, tuple(shapes.values()), dtype, "cuda", sizes, wanted)
    compiled = Plan(request, backend="triton").compiled
    for direction, runner in (
        ("forward", compiled.forward_runner),
        ("backward", compiled.backward_runner),
    ):
        if runner is None or runner.schedule is None:
            continue
        for report in traversal_reports(runner.schedule, dtype, target, elements):
            yield StepReport(direction, *report)
        for report in _products(runner.schedule, dtype, target, precision):
            yield StepReport(direction, *report)


def traversal_reports(
    schedule: Schedule,
    dtype: torch.dtype,
    target: str = "sm_90",
    elements: int = BLOCK_ELEMENTS,
) -> Iterator[tuple[str, KernelReport]]:
    """What each generated traversal walks over, and what it uses on `target`."""
    from dataeff.rgnn import triton_backend

    module = load_kernels(triton_backend.generate(schedule, dtype, elements))
    for number, kernel in triton_backend.kernels(schedule, dtype, elements).items():
        step = schedule.steps[number]
        assert isinstance(step, Traversal)
        kinds = [
            f"*{TRITON_NAMES[dtype]}" if kind == "value" else "*i32" for kind, _ in kernel.arguments
        ]
        work = f"traversal over {step.center}" + (f" along {step.map}" if step.map else "")
        yield work, _traversal(module, kernel.name, [*kinds, "i32"], kernel.num_warps, target)
        if kernel.map:
            longer = ["*i32", *kinds, "i32"]
            name = f"{kernel.name}_long"
            yield f"{work}, long rows", _traversal(module, name, longer, kernel.long_warps, target)


def _traversal(
    module: ModuleType, name: str, kinds: list[str], num_warps: int, target: str
) -> KernelReport:
    function = getattr(module, name)
    signature = dict(zip(function.arg_names, kinds, strict=True))
    # Row pointers are views that start one entry late; all else has a storage of its own.
    aligned = [a for a in signature if not a.startswith(("begin_", "end_", "rows"))]
    return compile_kernel(
        function,
        signature,
        {},
        target,
        num_warps=num_warps,
        max_registers=MAX_REGISTERS,
        divisible_by_16=aligned,
    )


def product_reports(
    schedule: Schedule, dtype: torch.dtype, target: str = "sm_90", precision: str = "ieee"
) -> list[KernelReport]:
    """What the typed products of a schedule use on `target`, one report per kind and size.

    Args:
        schedule: a lowered program.
        dtype: of its values.
        target: `sm_80`, `sm_90`, `sm_100`, ...
        precision: of float32 products, `ieee` or `tf32`.
    """
    return [report for _, report in _products(schedule, dtype, target, precision)]


def _products(
    schedule: Schedule, dtype: torch.dtype, target: str, precision: str
) -> Iterator[tuple[str, KernelReport]]:
    products = {_product(schedule, s) for s in schedule.steps if isinstance(s, Gemm)}
    for kind, num_in, num_out in sorted(products):
        work = f"product, {num_in} to {num_out}"
        if kind == "outer":
            report = dw_report(dtype, num_in, num_out, target, precision)
            work = f"weight gradient, {num_in} x {num_out}"
        else:
            transposed = kind == "linear_t"
            report = gemm_report(dtype, num_in, num_out, target, precision, transposed=transposed)
        yield work, report


def gemm_report(
    dtype: torch.dtype,
    num_in: int,
    num_out: int,
    target: str = "sm_90",
    precision: str = "ieee",
    *,
    transposed: bool = False,
    block_m: int = 64,
) -> KernelReport:
    """`typed_gemm`'s kernel with gathered, scaled rows; `transposed` reads weight^T in place.

    `block_m` is the rows of a tile: 64, and 32 or 16 where types have few rows.
    """
    from dataeff.kernels.typed_gemm import typed_gemm_kernel

    tiles = gemm_schedule(dtype, num_in, num_out, 1 << 20, 64, block_m)
    constexprs = {
        **_shared(num_in, num_out, precision),
        ("stride_w_in" if transposed else "stride_w_out"): 1,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
    }
    return _report(typed_gemm_kernel, dtype, constexprs, target, tiles)


def dw_report(
    dtype: torch.dtype,
    num_in: int,
    num_out: int,
    target: str = "sm_90",
    precision: str = "ieee",
) -> KernelReport:
    """`typed_gemm_dw`'s kernel with gathered, scaled rows."""
    from dataeff.kernels.typed_gemm import typed_gemm_dw_kernel

    tiles = dw_schedule(dtype, num_in, num_out, precision)
    constexprs = {
        **_shared(num_in, num_out, precision),
        "BLOCK_I": tiles.block_m,
        "BLOCK_O": tiles.block_n,
        "BLOCK_R": tiles.block_k,
    }
    return _report(typed_gemm_dw_kernel, dtype, constexprs, target, tiles)


def _shared(num_in: int, num_out: int, precision: str) -> dict[str, Any]:
    flags = {"HAS_GATHER": True, "HAS_SCALE": True, "INT64": False, "PRECISION": precision}
    return {"IN": num_in, "OUT": num_out, "stride_s_row": 1, "stride_s_head": 1, **flags}


def _report(
    kernel: Any,
    dtype: torch.dtype,
    constexprs: dict[str, Any],
    target: str,
    tiles: GemmSchedule,
) -> KernelReport:
    sums = "*fp64" if dtype == torch.float64 else "*fp32"
    values = f"*{TRITON_NAMES[dtype]}"
    kinds = {"X": values, "W": values, "Y": values, "DY": values, "First": sums, "Extra": sums}
    kinds |= {"RowScale": "*fp32", "Gather": "*i32"}
    kinds |= dict.fromkeys(("SegPtr", "TileType", "TileRow", "ExtraPtr"), "*i32")
    names = [name for name in kernel.arg_names if name not in constexprs]
    signature = {name: kinds.get(name, "i32") for name in names}
    # Feature counts that 16 does not divide leave the row strides unaligned, as a launch would see.
    odd = constexprs["IN"] % 16 or constexprs["OUT"] % 16
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or not odd]
    return compile_kernel(
        kernel,
        signature,
        constexprs,
        target,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        max_registers=tiles.max_registers,
        divisible_by_16=aligned,
    )


def _product(schedule: Schedule, step: Gemm) -> tuple[str, int, int]:
    """(kind, features in, features out) of one head of a typed product, as it is carried out."""
    op = schedule.program[step.op]
    x, other = (schedule.program[a].type.shape for a in op.args)
    if op.kind == "outer":
        return op.kind, x[-1], prod(other) // prod(x[:-1])
    batch = len(op.type.shape if op.kind == "linear_t" else x) - 1
    sizes = other[batch], prod(other[batch + 1 :])
    return op.kind, *(sizes if op.kind == "linear" else reversed(sizes))
