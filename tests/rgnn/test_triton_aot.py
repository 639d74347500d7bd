"""Generated kernels compile ahead of time for the GPUs we support, without spills.

`benchmarks/build_grid.py` compiles the full grid of layers, widths, heads, dtypes and targets.
"""

import re

import pytest
import torch
from rgnn_layers import gated, heads

from dataeff.nn.published import PUBLISHED
from dataeff.rgnn.aot import load_kernels
from dataeff.rgnn.build import TARGETS, traversal_reports
from dataeff.rgnn.plan import Plan, Request, spec_of
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.triton import backend as triton_backend

pytest.importorskip("triton")

SIZES = (100_000, 100_000, 1_000_000, 400_000, 400_000, 64, 4)
# Every layer, target and dtype at least once; test_aot.py compiles the products they share.
POINTS = [
    ("rgcn", "sm_90", torch.bfloat16, 64, 1),
    ("rgat", "sm_80", torch.float32, 256, 4),
    ("hgt", "sm_100", torch.float32, 128, 2),
    ("simple_hgn", "sm_90", torch.bfloat16, 32, 2),
    ("comp_gcn", "sm_80", torch.float32, 128, 1),
]


def traversals(layer, shapes, statics, dtype=torch.float32, target="sm_90", typed=False):
    """What the generated kernels of both directions use."""
    spec = spec_of(tuple(shapes), tuple(statics.items()), typed=typed)
    wanted = (1 << len(shapes)) - 1
    request = Request(layer.id, spec, tuple(shapes.values()), dtype, "cuda", SIZES, wanted)
    compiled = Plan(request, backend="triton").compiled
    for runner in (compiled.forward_runner, compiled.backward_runner):
        for *_, report in traversal_reports(runner.schedule, dtype, target):
            yield report


@pytest.mark.parametrize(("name", "target", "dtype", "width", "num_heads"), POINTS)
def test_published_layers_fit(name, target, dtype, width, num_heads):
    found = PUBLISHED[name]
    shapes = found.shapes(SIZES[0], SIZES[6], SIZES[5], width, num_heads, width // num_heads)
    reports = list(
        traversals(found.layer, shapes, found.statics(num_heads), dtype, target, found.typed)
    )
    assert len(reports) > 3 and all(report.fits for report in reports), reports


@pytest.mark.parametrize("layer", [gated, heads], ids=lambda f: f.name)
def test_layers_in_no_paper_fit(layer):
    nodes, _, edges, _, _, relations, _ = SIZES
    shapes = {
        gated: {"x": (nodes, 64), "W": (relations, 64, 64), "U": (64, 64), "c": (relations,)}
        | {"e": (edges,)},
        heads: {"x": (nodes, 5), "W": (relations, 5, 12), "K": (24, 24), "a": (relations, 24)},
    }[layer]
    reports = list(traversals(layer, shapes, {}))
    assert reports and all(report.fits for report in reports), reports


def runners(found, width):
    """Of a published layer with two heads, forward and backward."""
    shapes = found.shapes(SIZES[0], SIZES[6], SIZES[5], width, 2, width // 2)
    spec = spec_of(tuple(shapes), tuple(found.statics(2).items()), typed=found.typed)
    request = Request(
        *(found.layer.id, spec, tuple(shapes.values()), torch.float32, "cuda", SIZES),
        (1 << len(shapes)) - 1,
    )
    compiled = Plan(request, backend="triton").compiled
    return compiled.forward_runner, compiled.backward_runner


def test_blocks_of_every_size_share_their_kernels():
    """A number that Triton specialises (by 1, by multiples of 16) would be compiled anew."""
    for name, found in PUBLISHED.items():
        for runner in runners(found, 32):
            kernels = triton_backend.kernels(runner.schedule, torch.float32)
            module = load_kernels(triton_backend.generate(runner.schedule, torch.float32))
            for kernel in kernels.values():
                for text in kernel.functions:
                    *tensors, rows = getattr(module, text).params
                    assert rows.name == "rows" and rows.do_not_specialize, name
                    assert not any(p.is_constexpr for p in tensors)


def test_addresses_of_rows_take_64_bits():
    """Row numbers are int32 in memory; times a width they may not be."""
    seen = set()
    for found in PUBLISHED.values():
        for runner in runners(found, 64):
            text = triton_backend.generate(runner.schedule, torch.float32)
            for function in text.split("@triton.jit")[1:]:
                wide: set[str] = set()
                for name, first, rest in re.findall(r"(\w+) = (\w+)(.*)", function):
                    if "tl.int64)" in rest or first in wide:  # it is made so, or starts with one
                        wide.add(name)
                for where in re.findall(r"tl\.(?:load|store)\(((?:v\d+|parts) \+ .*)", function):
                    name = where.split(" + ")[1].strip("(").split("[")[0].split(" ")[0]
                    assert name in wide, where
                    seen.add(name[0])
    assert seen == set("ierasz")  # center, inner and other rows, pieces, slots, the only one


def test_targets_are_the_ones_promised():
    assert TARGETS == ("sm_80", "sm_90", "sm_100")


def test_sums_of_a_few_rows_take_no_shared_memory():
    """Each thread adds up what it has read: no row of a sum crosses to another thread or warp."""
    found = PUBLISHED["rgcn"]
    shapes = found.shapes(SIZES[0], SIZES[6], SIZES[5], 64, 1, 64)
    spec = spec_of(tuple(shapes), tuple(found.statics(1).items()), typed=found.typed)
    request = Request(
        *(found.layer.id, spec, tuple(shapes.values()), torch.float32, "cuda", SIZES),
        (1 << len(shapes)) - 1,
    )
    compiled = Plan(request, backend="triton").compiled
    reports = [
        report
        for runner in (compiled.forward_runner, compiled.backward_runner)
        for work, _, report in traversal_reports(runner.schedule, torch.float32)
        if not work.endswith(("long rows", "hubs"))
    ]
    assert len(reports) > 2 and [report.shared_bytes for report in reports] == [0] * len(reports)


def test_loops_of_long_rows_have_loads_under_way_where_a_choice_says_so():
    """Blocks that are fetched ahead stand in shared memory; nothing spills for them."""
    found = PUBLISHED["rgat"]
    shapes = found.shapes(SIZES[0], SIZES[6], SIZES[5], 64, 1, 64)
    spec = spec_of(tuple(shapes), tuple(found.statics(1).items()), typed=found.typed)
    request = Request(
        *(found.layer.id, spec, tuple(shapes.values()), torch.float32, "cuda", SIZES),
        (1 << len(shapes)) - 1,
    )
    runner = Plan(request, backend="triton").compiled.forward_runner
    shared = []
    for stages in (1, 3):
        found = traversal_reports(runner.schedule, torch.float32, choice=Choice(long_stages=stages))
        reports = {work: report for work, _, report in found}
        assert all(report.fits for report in reports.values()), reports
        long = [r.shared_bytes for work, r in reports.items() if work.endswith("long rows")]
        shared.append(max(long))
    block = 64 * 64 * 4
    assert shared[0] < block and shared[1] >= 2 * block
