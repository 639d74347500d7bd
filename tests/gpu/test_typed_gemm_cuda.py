"""Typed GEMM on CUDA: the reference's values, no host sync, CUDA graphs, torch's TF32 flag."""

import pytest
import torch

from dataeff.rgnn.gemm import (
    typed_gemm,
    typed_gemm_dw,
    typed_gemm_dw_reference,
    typed_gemm_reference,
)
from dataeff.rgnn.tilemap import build_tile_map

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
COUNTS = [0, 1, 700, 15, 0, 16, 4000, 33, 1, 0]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make_case(dtype, num_in, num_out, heads=(), gather=True):
    torch.manual_seed(0)
    rows = sum(COUNTS)
    table = 1000 if gather else rows
    inputs = {
        "x": torch.randn(table, *heads, num_in),
        "weight": torch.randn(len(COUNTS), *heads, num_in, num_out) / num_in**0.5,
        "dy": torch.randn(rows, *heads, num_out),
    }
    inputs = {name: tensor.to("cuda", dtype) for name, tensor in inputs.items()}
    options = {"row_scale": torch.rand(rows, *heads, device="cuda")}
    if gather:
        options["gather"] = torch.randint(table, (rows,), device="cuda", dtype=torch.int32)
    seg_ptr = torch.tensor([0, *COUNTS], device="cuda").cumsum(0, dtype=torch.int32)
    return inputs, seg_ptr, options


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 64), (32, 256), (50, 33), (128, 16)])
@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("gather", [True, False])
def test_equals_reference(dtype, num_in, num_out, heads, gather):
    inputs, seg_ptr, options = make_case(dtype, num_in, num_out, heads, gather)
    x, weight, dy = inputs.values()
    y = typed_gemm(x, weight, seg_ptr, **options)
    dw = typed_gemm_dw(x, dy, seg_ptr, **options)
    assert y.dtype == dw.dtype == dtype
    assert torch.equal(dw, typed_gemm_dw(x, dy, seg_ptr, **options))
    wide = [tensor.double() for tensor in (x, weight, dy)]
    options["row_scale"] = options["row_scale"].double()
    expected_y = typed_gemm_reference(wide[0], wide[1], seg_ptr, **options)
    expected_dw = typed_gemm_dw_reference(wide[0], wide[2], seg_ptr, **options)
    assert relative_error(y, expected_y) < TOLERANCE[dtype]
    assert relative_error(dw, expected_dw) < TOLERANCE[dtype]


def test_nothing_waits_for_the_device(waits_are_errors):
    inputs, seg_ptr, options = make_case(torch.float32, 64, 64)
    x, weight, dy = inputs.values()
    typed_gemm(x, weight, seg_ptr, **options)  # compiles
    typed_gemm_dw(x, dy, seg_ptr, **options)
    with waits_are_errors():
        typed_gemm(x, weight, seg_ptr, **options)
        typed_gemm_dw(x, dy, seg_ptr, **options)


def test_captured_in_a_cuda_graph_with_other_segments_later():
    inputs, seg_ptr, options = make_case(torch.float32, 64, 64)
    x, weight, dy = inputs.values()
    typed_gemm(x, weight, seg_ptr, **options)
    typed_gemm_dw(x, dy, seg_ptr, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = typed_gemm(x, weight, seg_ptr, **options)
        dw = typed_gemm_dw(x, dy, seg_ptr, **options)
    moved = [*COUNTS[5:], *COUNTS[:5]]
    seg_ptr.copy_(torch.tensor([0, *moved]).cumsum(0, dtype=torch.int32))
    graph.replay()
    assert torch.equal(y, typed_gemm(x, weight, seg_ptr, **options))
    assert torch.equal(dw, typed_gemm_dw(x, dy, seg_ptr, **options))


def test_tf32_only_when_torch_says_so():
    inputs, seg_ptr, options = make_case(torch.float32, 128, 128)
    x, weight, _ = inputs.values()
    expected = typed_gemm_reference(x.double(), weight.double(), seg_ptr, **options).double()
    matmul = torch.backends.cuda.matmul
    before, errors = matmul.fp32_precision, {}
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            errors[precision] = relative_error(typed_gemm(x, weight, seg_ptr, **options), expected)
    finally:
        matmul.fp32_precision = before
    assert errors["ieee"] < 1e-6 < errors["tf32"] < 2e-3


def test_kept_maps_give_the_same_result():
    inputs, seg_ptr, options = make_case(torch.bfloat16, 64, 96)
    x, weight, dy = inputs.values()
    rows = sum(COUNTS)
    y = typed_gemm(x, weight, seg_ptr, tile_map=build_tile_map(seg_ptr, rows, 64), **options)
    dw = typed_gemm_dw(x, dy, seg_ptr, chunk_map=build_tile_map(seg_ptr, rows, 512), **options)
    assert relative_error(y, typed_gemm(x, weight, seg_ptr, **options).double()) < 1e-2
    assert relative_error(dw, typed_gemm_dw(x, dy, seg_ptr, **options).double()) < 1e-2
    assert y.shape == (rows, 96) and dw.shape == (len(COUNTS), 64, 96)
