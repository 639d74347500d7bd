"""Compiles a layer's kernels ahead of time, for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from dataeff.rgnn.aot import KernelReport, capability_of, compile_kernel, load_kernels
from dataeff.rgnn.cost import product_of, tile_of
from dataeff.rgnn.kernels_ir import Gemm, Schedule, Traversal
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.triton.source import FP_FUSION, MAX_REGISTERS
from dataeff.rgnn.triton.tiles import GemmSchedule, Product, schedule_of

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
    """One kernel of a layer: in which direction it runs, what it does, how, and what it uses.

    `schedule` has its block sizes, warps and stages by name.
    """

    direction: str
    work: str
    schedule: dict[str, int]
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
    choice: Choice | None = None,
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
        choice: what `rgnn.tune` chose, or the cost model's tiles and the usual sizes if None.
    """
    choice = choice or Choice()
    spec = spec_of(tuple(shapes), tuple((statics or {}).items()), typed=typed, choice=choice)
    wanted = (1 << len(shapes)) - 1
    request = Request(layer.id, spec, tuple(shapes.values()), dtype, "cuda", sizes, wanted)
    plan = Plan(request, backend="triton").compiled
    forward = plan.forward_runner
    saved = {
        f"saved:{k}": forward.dtype_of(value)
        for k, value in enumerate(plan.forward.outputs[plan.num_outputs :])
    }
    for direction, runner in (("forward", forward), ("backward", plan.backward_runner)):
        if runner is None or runner.schedule is None:
            continue
        inputs = {str(op.attrs[0]): op.id for op in runner.program.inputs}
        dtypes = {value: runner.dtype_of(value) for value in runner.wide}
        dtypes |= {inputs[name]: kept for name, kept in saved.items() if name in inputs}
        for report in traversal_reports(runner.schedule, dtype, target, choice, dtypes):
            yield StepReport(direction, *report)
        for report in product_reports(
            runner.schedule, plan.sizes, dtype, target, precision, choice
        ):
            yield StepReport(direction, *report)


def traversal_reports(
    schedule: Schedule,
    dtype: torch.dtype,
    target: str = "sm_90",
    choice: Choice | None = None,
    dtypes: Mapping[int, torch.dtype] | None = None,
) -> Iterator[tuple[str, dict[str, int], KernelReport]]:
    """What each generated traversal walks over, its sizes, and what it uses on `target`.

    `dtypes` are those of values that are not of `dtype`.
    """
    from dataeff.rgnn.triton import backend as triton_backend

    module = load_kernels(triton_backend.generate(schedule, dtype, choice))
    for number, kernel in triton_backend.kernels(schedule, dtype, choice).items():
        step = schedule.steps[number]
        assert isinstance(step, Traversal)
        kinds = [
            f"*{TRITON_NAMES[(dtypes or {}).get(what, dtype)]}" if isinstance(what, int) else "*i32"
            for _, what in kernel.arguments
        ]
        work = f"traversal over {step.center}" + (f" along {step.map}" if step.map else "")
        short = {"block_rows": kernel.block, "num_warps": kernel.num_warps}
        if kernel.hubs is None:
            report = _traversal(module, kernel.name, [*kinds, "i32"], kernel.num_warps, target)
            yield work, short, report
            continue
        short = {"center_rows": kernel.rows_per_program, **short}
        report = _traversal(module, kernel.name, [*kinds, "i32"], kernel.num_warps, target)
        yield work, short, report
        sizes = {"block_rows": kernel.long_block, "num_warps": kernel.long_warps}
        sizes["num_stages"] = kernel.long_stages
        sums = "*fp64" if dtype == torch.float64 else "*fp32"
        others = {f"{kernel.name}_long": ("long rows", kernel.long_row, ["*i32", "*i32"])}
        for name in kernel.hubs.names:
            others[name] = "hubs", kernel.hub, ["*i32", "*i32", sums]
        for name, (which, longer_than, before) in others.items():
            report = _traversal(module, name, [*before, *kinds, "i32"], kernel.long_warps, target)
            yield f"{work}, {which}", {"longer_than": longer_than, **sizes}, report


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
        fp_fusion=FP_FUSION,
        divisible_by_16=aligned,
    )


def product_reports(
    schedule: Schedule,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    target: str = "sm_90",
    precision: str = "ieee",
    choice: Choice | None = None,
) -> Iterator[tuple[str, dict[str, int], KernelReport]]:
    """What the typed products of a schedule are, their tiles, and what they use on `target`.

    One of each kind, size and tile.

    Args:
        schedule: a lowered program.
        sizes: rows of each domain, as of a `Plan`.
        dtype: of its values.
        target: `sm_80`, `sm_90`, `sm_100`, ...
        precision: of float32 products, `ieee` or `tf32`.
        choice: what `rgnn.tune` chose, or the cost model's tiles if None.
    """
    choice = choice or Choice()
    found: dict[tuple[str, bool, GemmSchedule], Product] = {}
    for step in schedule.steps:
        if not isinstance(step, Gemm):
            continue
        product = product_of(schedule, step, sizes)
        tile = tile_of(product, choice, dtype, precision, capability_of(target))
        name = f"product, {product.num_in} to {product.num_out}"
        if product.gradient:
            name = f"weight gradient, {product.num_in} x {product.num_out}"
        found[name, schedule.program[step.op].kind == "linear_t", tile] = product
    for (work, transposed, tile), product in sorted(found.items(), key=str):
        how = dtype, product.num_in, product.num_out, target, precision
        if product.gradient:
            report = dw_report(*how, tile=tile, scaled=False)
        else:
            report = gemm_report(*how, transposed=transposed, tile=tile, scaled=False)
        yield work, {k: v for k, v in tile._asdict().items() if v is not None}, report


def gemm_report(
    dtype: torch.dtype,
    num_in: int,
    num_out: int,
    target: str = "sm_90",
    precision: str = "ieee",
    *,
    transposed: bool = False,
    tile: GemmSchedule | None = None,
    scaled: bool = True,
) -> KernelReport:
    """`typed_gemm`'s kernel with gathered rows; `transposed` reads weight^T in place.

    `tile` is the cost model's for types of many rows if None. Layers launch it with rows that are
    not `scaled`.
    """
    from dataeff.kernels.typed_gemm import typed_gemm_kernel

    if tile is None:
        product = Product(False, 1, num_in, num_out, 1 << 20, 64)
        tile = schedule_of(product, dtype, precision, capability_of(target))
    constexprs = {
        **_shared(num_in, num_out, precision, scaled),
        ("stride_w_in" if transposed else "stride_w_out"): 1,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    return _report(typed_gemm_kernel, dtype, constexprs, target, tile)


def dw_report(
    dtype: torch.dtype,
    num_in: int,
    num_out: int,
    target: str = "sm_90",
    precision: str = "ieee",
    *,
    tile: GemmSchedule | None = None,
    scaled: bool = True,
) -> KernelReport:
    """`typed_gemm_dw`'s kernel with gathered rows; `tile` and `scaled` as for `gemm_report`."""
    from dataeff.kernels.typed_gemm import typed_gemm_dw_kernel

    if tile is None:
        product = Product(True, 1, num_in, num_out, 1 << 20, 64)
        tile = schedule_of(product, dtype, precision, capability_of(target))
    constexprs = {
        **_shared(num_in, num_out, precision, scaled),
        "BLOCK_I": tile.block_m,
        "BLOCK_O": tile.block_n,
        "BLOCK_R": tile.block_k,
    }
    return _report(typed_gemm_dw_kernel, dtype, constexprs, target, tile.as_launched(gathered=True))


def _shared(num_in: int, num_out: int, precision: str, scaled: bool) -> dict[str, Any]:
    flags = {"HAS_GATHER": True, "HAS_SCALE": scaled, "INT64": False, "PRECISION": precision}
    if not scaled:
        flags["RowScale"] = None
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
