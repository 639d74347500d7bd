import pytest
import rgnn_layers
import torch

from dataeff import rgnn
from dataeff.kernels import interpreter
from dataeff.kernels import typed_gemm as kernels
from dataeff.nn.published import PUBLISHED
from dataeff.rgnn import aot
from dataeff.rgnn.aot import compile_kernel, load_kernels
from dataeff.rgnn.build import TARGETS, dw_report, gemm_report, product_reports
from dataeff.rgnn.lower import lower
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.triton.tiles import GemmSchedule, Product, ranked_tiles

# Every feature size, dtype and target at least once, square and not, without the full product;
# benchmarks/build_grid.py compiles that.
POINTS = [
    ("sm_80", torch.float32, "tf32", 256, 256),
    ("sm_80", torch.float64, "ieee", 64, 128),
    ("sm_90", torch.float32, "ieee", 50, 33),
    ("sm_90", torch.float32, "ieee", 256, 256),
    ("sm_90", torch.bfloat16, "ieee", 32, 32),
    ("sm_100", torch.float32, "ieee", 32, 128),
    ("sm_100", torch.bfloat16, "ieee", 64, 64),
    ("sm_100", torch.bfloat16, "ieee", 256, 4),  # 16 wide spilled under Triton 3.6
]


@pytest.mark.parametrize(("target", "dtype", "precision", "num_in", "num_out"), POINTS)
def test_forward_compiles_without_spills(target, dtype, precision, num_in, num_out):
    report = gemm_report(dtype, num_in, num_out, target, precision)
    assert report.fits, report
    assert report.name == "typed_gemm_kernel" and report.target == target
    assert 16 < report.registers <= 255 and report.cubin_bytes > 1000 and report.ptx_bytes > 1000


@pytest.mark.parametrize(("target", "dtype", "precision", "num_in", "num_out"), POINTS)
def test_weight_gradient_compiles_without_spills(target, dtype, precision, num_in, num_out):
    report = dw_report(dtype, num_in, num_out, target, precision)
    assert report.fits and report.name == "typed_gemm_dw_kernel", report


@pytest.mark.parametrize(("target", "share"), [("sm_80", 0.5), ("sm_90", 1.0)])
def test_gathered_rows_of_a_weight_gradient_are_under_way_in_the_stages_of_its_tile(target, share):
    """They wait for row numbers of the same loop; an sm_80 holds one stage fewer of any loop."""
    tile = GemmSchedule(64, 64, 32, 4, 3, 168)
    report = dw_report(torch.float32, 128, 128, target, "tf32", tile=tile, scaled=False)
    assert report.fits and report.shared_bytes >= share * 3 * (64 + 64) * 32 * 4, report


def test_transposed_weight_compiles_without_spills():
    # dx = dy @ weight^T reads the weight through swapped strides.
    assert gemm_report(torch.bfloat16, 128, 128, transposed=True).fits


# Every tile of either kernel once, on targets in turn; benchmarks/build_grid.py compiles them all.
TILES = [
    (product, dtype, precision, tile)
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.half, "ieee"))
    for product in (
        Product(False, 1, 256, 256, 1 << 20, 64),
        Product(True, 1, 256, 256, 1 << 20, 64),
    )
    for tile in ranked_tiles(product, dtype, precision)
]


@pytest.mark.parametrize(("number", "case"), list(enumerate(TILES)), ids=str)
def test_tiles_that_tuning_tries_compile_without_spills(number, case):
    product, dtype, precision, tile = case
    how = dtype, product.num_in, product.num_out, TARGETS[number % 3], precision
    report = dw_report(*how, tile=tile) if product.gradient else gemm_report(*how, tile=tile)
    assert report.fits, report


@pytest.mark.parametrize("transposed", [False, True])
def test_float64_products_of_few_rows_compile_without_spills(transposed):
    product = Product(False, 1, 128, 128, 1 << 20, 64)
    (tile,) = (t for t in ranked_tiles(product, torch.float64) if t.block_m == 16)
    assert gemm_report(torch.float64, 128, 128, transposed=transposed, tile=tile).fits


def test_half_products_of_few_rows_compile_without_spills():
    """Under Triton 3.6 the assembler's own choice of registers spilled."""
    product = Product(False, 1, 256, 64, 1 << 20, 64)
    (tile,) = (t for t in ranked_tiles(product, torch.bfloat16) if t.block_m == 32)
    assert gemm_report(torch.bfloat16, 256, 64, tile=tile, scaled=False).fits


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("block", [128, 1024])
@pytest.mark.parametrize("in_place", [True, False])
def test_reduction_compiles(in_place, block, target):
    pointers = {"First": "*fp32", "Extra": "*fp32", "Out": "*fp32" if in_place else "*bf16"}
    report = compile_kernel(
        kernels.reduce_partials_kernel,
        pointers | {"SegPtr": "*i32", "ExtraPtr": "*i32"},
        {"SIZE": 4096, "IN_PLACE": in_place, "PARTS": 4096 // block, "BLOCK": block},
        target,
        num_warps=8,
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
    for target in ("hopper", "sm_200"):  # of which LLVM ends the process
        with pytest.raises(ValueError, match=f"one of sm_80, .*sm_121, got '{target}'"):
            aot.capability_of(target)
    with pytest.raises(ValueError, match=r"missing .*'Out'.*unknown .*'Other'"):
        compile_kernel(kernel, {"First": "*fp32", "Other": "*fp32"}, {"SIZE": 1})
    with interpreter.interpreted(kernels), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_kernel(kernels.reduce_partials_kernel, {}, {})


def test_products_of_layers_are_reported_as_they_are_launched():
    """Without row scales, which layers do not give: scaled, this one spills on an sm_80."""
    found, width = PUBLISHED["rgcn"], 256
    sizes = (100_000, 100_000, 1_000_000, 400_000, 400_000, 64, 4)
    shapes = found.shapes(sizes[0], sizes[6], sizes[5], width, 1, width)
    spec = spec_of(tuple(shapes), tuple(found.statics(1).items()), typed=found.typed)
    half = torch.bfloat16
    request = Request(found.layer.id, spec, tuple(shapes.values()), half, "cuda", sizes, 3)
    backward = Plan(request, backend="triton").compiled.backward_runner.schedule
    reports = [report for *_, report in product_reports(backward, sizes, half, "sm_80")]
    assert len(reports) > 1 and all(report.fits for report in reports), reports


def test_every_product_of_a_layer_is_reported():
    graph = rgnn.Graph(
        torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]]), torch.tensor([0, 1, 1, 0]), num_nodes=3
    )
    shapes = [(3, 48), (2, 48, 32)]
    args = [torch.randn(shape, requires_grad=True) for shape in shapes]
    plan = rgnn_layers.rgcn.plan(graph, *args)
    made = plan.compiled
    assert made.backward is not None
    names = []
    for program in (made.forward, made.backward):
        found = product_reports(lower(program), plan.sizes, torch.float32, "sm_90")
        reports = [report for *_, report in found]
        assert all(report.fits for report in reports), reports
        names += [report.name for report in reports]
    assert {"typed_gemm_kernel", "typed_gemm_dw_kernel"} == set(names)
