"""Compiles typed products ahead of time, for a GPU that need not be there."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from dataeff.rgnn.aot import KernelReport, compile_kernel
from dataeff.rgnn.kernels_ir import Gemm, Schedule
from dataeff.rgnn.schedule import dw_schedule, gemm_schedule

TRITON_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


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
    reports = []
    products = {_product(schedule, s) for s in schedule.steps if isinstance(s, Gemm)}
    for kind, num_in, num_out in sorted(products):
        if kind == "outer":
            reports.append(dw_report(dtype, num_in, num_out, target, precision))
        else:
            transposed = kind == "linear_t"
            reports.append(
                gemm_report(dtype, num_in, num_out, target, precision, transposed=transposed)
            )
    return reports


def gemm_report(
    dtype: torch.dtype,
    num_in: int,
    num_out: int,
    target: str = "sm_90",
    precision: str = "ieee",
    *,
    transposed: bool = False,
) -> KernelReport:
    """`typed_gemm`'s kernel with gathered, scaled rows; `transposed` reads weight^T in place."""
    from dataeff.kernels.typed_gemm import typed_gemm_kernel

    tiles = gemm_schedule(dtype, num_in, num_out, num_rows=1 << 20, num_types=64)
    constexprs = {
        **_shared(num_in, num_out, precision),
        ("stride_w_in" if transposed else "stride_w_out"): 1,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
    }
    return _report(typed_gemm_kernel, dtype, constexprs, target, tiles.num_warps, tiles.num_stages)


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
    return _report(
        typed_gemm_dw_kernel, dtype, constexprs, target, tiles.num_warps, tiles.num_stages
    )


def _shared(num_in: int, num_out: int, precision: str) -> dict[str, Any]:
    flags = {"HAS_GATHER": True, "HAS_SCALE": True, "INT64": False, "PRECISION": precision}
    return {"IN": num_in, "OUT": num_out, "stride_s_row": 1, "stride_s_head": 1, **flags}


def _report(
    kernel: Any,
    dtype: torch.dtype,
    constexprs: dict[str, Any],
    target: str,
    num_warps: int,
    num_stages: int,
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
        num_warps=num_warps,
        num_stages=num_stages,
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
