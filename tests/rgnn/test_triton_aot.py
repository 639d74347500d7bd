"""Generated kernels compile ahead of time for the GPUs we support, without spills."""

import pytest
import torch
from rgnn_layers import rgat, rgcn_mean

from dataeff import rgnn
from dataeff.rgnn.lower import lower

pytest.importorskip("triton")


def reports(program, target):
    from dataeff.rgnn import triton_backend
    from dataeff.rgnn.aot import compile_kernel, load_kernels

    schedule = lower(program, triton_backend.DENSE_KINDS)
    module = load_kernels(triton_backend.generate(schedule, torch.float32))
    for kernel in triton_backend.kernels(schedule, torch.float32).values():
        names = [("*fp32" if kind == "value" else "*i32") for kind, _ in kernel.arguments]
        function = getattr(module, kernel.name)
        signature = dict(zip(function.arg_names, [*names, "i32"], strict=True))
        yield compile_kernel(
            function, signature, {}, target, num_warps=kernel.num_warps, divisible_by_16=[]
        )


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("width", [32, 64, 256])
def test_rgat_forward_and_backward_fit(target, width):
    if target != "sm_90" and width != 64:
        pytest.skip("other widths are compiled for one target")
    graph = rgnn.Graph(torch.randint(0, 50, (2, 200)), torch.randint(0, 3, (200,)), num_nodes=50)
    a = torch.randn(3, width)
    plan = rgat.plan(graph, torch.randn(50, width), torch.randn(3, width, width), a, a)
    for program in (plan.compiled.forward, plan.compiled.backward):
        for report in reports(program, target):
            assert report.spill_bytes == 0, report
            assert report.fits, report


def test_rgcn_fits():
    graph = rgnn.Graph(torch.randint(0, 50, (2, 200)), torch.randint(0, 3, (200,)), num_nodes=50)
    x, W, root = torch.randn(50, 64), torch.randn(3, 64, 64), torch.randn(64, 64)
    plan = rgcn_mean.plan(graph, x, W, root, torch.randn(64))
    for program in (plan.compiled.forward, plan.compiled.backward):
        assert all(report.fits for report in reports(program, "sm_90"))
