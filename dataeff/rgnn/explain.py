"""`Layer.explain`: every stage of a compilation as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dataeff.rgnn import domains
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.cost import product_of, step_cost, tile_of
from dataeff.rgnn.cpp.toolchain import why_none_compiles
from dataeff.rgnn.graph import Graph
from dataeff.rgnn.kernels_ir import Gemm, render_schedule
from dataeff.rgnn.memory_plan import render_moments
from dataeff.rgnn.passes.compact import left_on_edges
from dataeff.rgnn.passes.pipeline import rows_of
from dataeff.rgnn.plan import Compiled, Plan
from dataeff.rgnn.text import render
from dataeff.rgnn.triton.gemm import capability, float32_precision
from dataeff.rgnn.triton.tiles import modelled_s

if TYPE_CHECKING:
    from dataeff.rgnn.layer import Layer


def explain(
    layer: Layer,
    graph: Graph,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    backend: str | None = None,
) -> str:
    """Programs after each pass, then the forward and backward programs that run.

    `backend` shows the kernels of `cpp` or `triton` instead of those that this machine runs.
    """
    plan = layer.plan(graph, *args, **kwargs)
    if backend is not None:
        plan = Plan(plan.request, backend=backend)
    parts = [f"layer {layer.name} on {graph!r}"]
    parts.append(
        f"(source, relation) pairs per edge {graph.src_pair_ratio:.3f},"
        f" (destination, relation) pairs per edge {graph.dst_pair_ratio:.3f}"
    )
    if plan.compiled.forward_runner.name == "cpp" and (reason := why_none_compiles()) is not None:
        parts.append(f"the kernels below do not run here, plain PyTorch does: {reason}")
    parts += _left_on_edges(plan.compiled)
    parts += [f"== {name} ==\n{render(program)}" for name, program in plan.compiled.stages]
    for title, runner in (
        ("forward", plan.compiled.forward_runner),
        ("backward", plan.compiled.backward_runner),
    ):
        if runner is not None:
            parts.append(f"== {title} ==\n{render(runner.program)}")
            if runner.schedule is not None:
                item_size = plan.request.dtype.itemsize
                costs = [
                    f"k{n}: {step_cost(runner.schedule, n, plan.sizes, item_size)}"
                    for n in range(len(runner.schedule.steps))
                ]
                parts.append(f"== {title} bytes and flops ==\n" + "\n".join(costs) + "\n")
                parts.append(f"== {title} kernels ==\n{render_schedule(runner.schedule)}")
                alive = render_moments(runner.schedule, plan.sizes, item_size)
                parts.append(f"== {title} memory plan ==\n{alive}")
                if runner.name == "triton":
                    parts.append(f"== {title} schedules ==\n{_schedules(runner, plan)}")
                parts.append(f"== {title} source ({runner.name}) ==\n{runner.sources()}")
    return "\n".join(parts)


def _left_on_edges(compiled: Compiled) -> list[str]:
    """A line for each value that pairs could hold, and do not because they are too many."""
    rows = rows_of(compiled.sizes)
    found = []
    for op, home in left_on_edges(compiled.stages[-1][1], rows):
        ratio = rows[home] / max(rows["edge"], 1)
        value = f"%{op.id} = {op.kind} : {op.type}"
        found.append(
            f"left on edges, at about {ratio:.2f} {domains.DOMAINS[home]}s per edge:"
            f" {value}  # {op.line}"
        )
    return found


def _schedules(runner: Runner, plan: Plan) -> str:
    """Blocks, tiles, warps and stages of each Triton kernel, as tuning or the cost model chose."""
    from dataeff.rgnn.triton.backend import kernels

    assert runner.schedule is not None
    generated = kernels(runner.schedule, runner.dtype, runner.choice)
    how = runner.dtype, float32_precision(), capability(torch.device(plan.request.device))
    lines = []
    for number, step in enumerate(runner.schedule.steps):
        if isinstance(step, Gemm):
            product = product_of(runner.schedule, step, plan.sizes)
            tile = tile_of(product, runner.choice, *how)
            microseconds = 1e6 * modelled_s(tile, product, *how)
            lines.append(f"k{number}: tile {tile}; modelled {microseconds:.1f} us")
        elif number in generated:
            k = generated[number]
            line = f"k{number}: {k.rows_per_program} rows at a time, {k.num_warps} warps"
            if k.hubs:
                line += (
                    f", {k.block} of {k.map} for each; rows of more than {k.long_row}: one,"
                    f" {k.long_block} at a time, {k.long_warps} warps, {k.long_stages} under way;"
                    f" of more than {k.hub}: pieces of as many, {', '.join(k.hubs.names)}"
                )
            lines.append(line)
    return "\n".join(lines) + "\n"
