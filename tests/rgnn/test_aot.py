import pytest
import torch
from dataeff.kernels import interpreter
from dataeff.kernels import typed_gemm as kernels

from dataeff.rgnn import aot
from dataeff.rgnn.aot import compile_kernel, load_kernels
from dataeff.rgnn.schedule import dw_schedule, gemm_schedule

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
}
# Every feature size, dtype and target at least once, square and not, without the full product.
POINTS = [
    ("sm_80", torch.float32, "ieee", 64, 64),
    ("sm_80", torch.float32, "tf32", 256, 256),
    ("sm_80", torch.bfloat16, "ieee", 128, 64),
    ("sm_80", torch.float64, "ieee", 64, 128),
    ("sm_90", torch.float32, "ieee", 256, 256),
    ("sm_90", torch.float32, "ieee", 50, 33),
    ("sm_90", torch.float32, "tf32", 64, 64),
    ("sm_90", torch.bfloat16, "ieee", 256, 256),
    ("sm_90", torch.bfloat16, "ieee", 32, 32),
    ("sm_100", torch.float32, "ieee", 32, 128),
    ("sm_100", torch.float32, "tf32", 128, 128),
    ("sm_100", torch.bfloat16, "ieee", 64, 64),
]
INTS = {"SegPtr": "*i32", "TileType": "*i32", "TileRow": "*i32", "ExtraPtr": "*i32"}


def signature_of(kernel, dtype, constexprs):
    floats = dict.fromkeys(("X", "W", "Y", "DY"), f"*{TYPES[dtype]}")
    sums = dict.fromkeys(("First", "Extra"), "*fp64" if dtype == torch.float64 else "*fp32")
    known = floats | sums | INTS | {"Gather": "*i32", "RowScale": "*fp32"}
    names = [name for name in kernel.arg_names if name not in constexprs]
    return {name: known.get(name, "i32") for name in names}


def constants(precision, num_in, num_out, **more):
    flags = {"HAS_GATHER": True, "HAS_SCALE": True, "INT64": False, "PRECISION": precision}
    return {"IN": num_in, "OUT": num_out, "stride_s_row": 1, "stride_s_head": 1, **flags, **more}


def compile_point(kernel, target, dtype, constexprs, schedule):
    # Feature sizes that 16 does not divide leave the strides unaligned, as a launch would see.
    signature = signature_of(kernel, dtype, constexprs)
    odd = constexprs["IN"] % 16 or constexprs["OUT"] % 16
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or not odd]
    return compile_kernel(
        kernel,
        signature,
        constexprs,
        target,
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        divisible_by_16=aligned,
    )


@pytest.mark.parametrize(("target", "dtype", "precision", "num_in", "num_out"), POINTS)
def test_forward_compiles_without_spills(target, dtype, precision, num_in, num_out):
    schedule = gemm_schedule(dtype, num_in, num_out, 10**6, 100)
    blocks = {"BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n}
    constexprs = constants(
        precision, num_in, num_out, BLOCK_K=schedule.block_k, stride_w_out=1, **blocks
    )
    kernel = kernels.typed_gemm_kernel
    report = compile_point(kernel, target, dtype, constexprs, schedule)
    assert report.fits, report
    assert report.name == "typed_gemm_kernel" and report.target == target
    assert 16 < report.registers <= 255 and report.cubin_bytes > 1000 and report.ptx_bytes > 1000


@pytest.mark.parametrize(("target", "dtype", "precision", "num_in", "num_out"), POINTS)
def test_weight_gradient_compiles_without_spills(target, dtype, precision, num_in, num_out):
    schedule = dw_schedule(dtype, num_in, num_out, precision)
    blocks = {"BLOCK_I": schedule.block_m, "BLOCK_O": schedule.block_n}
    constexprs = constants(precision, num_in, num_out, BLOCK_R=schedule.block_k, **blocks)
    kernel = kernels.typed_gemm_dw_kernel
    report = compile_point(kernel, target, dtype, constexprs, schedule)
    assert report.fits, report


def test_transposed_weight_compiles_without_spills():
    # dx = dy @ weight^T reads the weight through swapped strides.
    schedule = gemm_schedule(torch.bfloat16, 128, 128, 10**6, 100)
    blocks = {"BLOCK_M": schedule.block_m, "BLOCK_N": schedule.block_n, "BLOCK_K": schedule.block_k}
    constexprs = constants("ieee", 128, 128, stride_w_in=1, **blocks)
    kernel = kernels.typed_gemm_kernel
    assert compile_point(kernel, "sm_90", torch.bfloat16, constexprs, schedule).fits


@pytest.mark.parametrize("in_place", [True, False])
def test_reduction_compiles(in_place):
    pointers = {"First": "*fp32", "Extra": "*fp32", "Out": "*fp32" if in_place else "*bf16"}
    report = compile_kernel(
        kernels.reduce_partials_kernel,
        pointers | {"SegPtr": "*i32", "ExtraPtr": "*i32"},
        {"SIZE": 4096, "IN_PLACE": in_place, "BLOCK": 1024},
    )
    assert report.fits


GENERATED = """
import triton
import triton.language as tl


@triton.jit
def many_sums(X, Y, SIZE: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    x = tl.load(X + at)
    total = tl.sum(x, 1)
    tl.store(Y + at, tl.exp(x) * total[:, None] + tl.sum(x, 0)[None, :])
"""


def test_generated_source_compiles_and_spills_are_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAEFF_CACHE_DIR", str(tmp_path))
    module = load_kernels(GENERATED)
    assert load_kernels(GENERATED) is module
    (kept,) = (tmp_path / "triton").glob("*.py")
    assert kept.read_text() == GENERATED
    signature = {"X": "*fp32", "Y": "*fp32"}
    small = compile_kernel(module.many_sums, signature, {"SIZE": 16, "COLS": 16})
    large = compile_kernel(module.many_sums, signature, {"SIZE": 64, "COLS": 128}, num_warps=1)
    assert small.fits and small.spill_bytes == 0
    assert large.spill_bytes > 0 and not large.fits


def test_bad_calls_are_refused():
    kernel = kernels.reduce_partials_kernel
    with pytest.raises(ValueError, match="sm_90, got 'hopper'"):
        aot._capability("hopper")
    with pytest.raises(ValueError, match=r"missing .*'Out'.*unknown .*'Other'"):
        compile_kernel(kernel, {"First": "*fp32", "Other": "*fp32"}, {"SIZE": 1})
    with interpreter.interpreted(kernels), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_kernel(kernels.reduce_partials_kernel, {}, {})
