"""Generated kernels compile ahead of time for the GPUs we support, without spills.

`benchmarks/build_grid.py` compiles the full grid of layers, widths, heads, dtypes and targets.
"""

import pytest
import torch
from rgnn_layers import gated, heads

from dataeff.rgnn.build import TARGETS, layer_reports
from dataeff.rgnn.published import PUBLISHED

pytest.importorskip("triton")

SIZES = (100_000, 100_000, 1_000_000, 400_000, 400_000, 64, 4)
POINTS = [
    ("rgcn", "sm_90", torch.bfloat16, 64, 1),
    ("rgat", "sm_80", torch.float32, 64, 1),
    ("rgat", "sm_90", torch.float32, 256, 4),
    ("rgat", "sm_100", torch.bfloat16, 32, 1),
    ("hgt", "sm_90", torch.float32, 128, 2),
    ("hgt", "sm_100", torch.float32, 64, 1),
]


@pytest.mark.parametrize(("name", "target", "dtype", "width", "num_heads"), POINTS)
def test_published_layers_fit(name, target, dtype, width, num_heads):
    found = PUBLISHED[name]
    shapes = found.shapes(SIZES[0], SIZES[6], SIZES[5], width, num_heads, width // num_heads)
    reports = list(layer_reports(found.layer, shapes, SIZES, dtype=dtype, target=target))
    assert all(report.kernel.fits for report in reports), reports
    assert {report.direction for report in reports} == {"forward", "backward"}


@pytest.mark.parametrize("layer", [gated, heads], ids=lambda f: f.name)
def test_layers_in_no_paper_fit(layer):
    nodes, _, edges, _, _, relations, _ = SIZES
    shapes = {
        gated: {"x": (nodes, 64), "W": (relations, 64, 64), "U": (64, 64), "c": (relations,)}
        | {"e": (edges,)},
        heads: {"x": (nodes, 5), "W": (relations, 5, 12), "K": (24, 24), "a": (relations, 24)},
    }[layer]
    reports = list(layer_reports(layer, shapes, SIZES))
    assert all(report.kernel.fits for report in reports), reports


def test_targets_are_the_ones_promised():
    assert TARGETS == ("sm_80", "sm_90", "sm_100")
