"""`Layer.explain`: every stage of a compilation as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dataeff.rgnn.graph import Graph
from dataeff.rgnn.text import render

if TYPE_CHECKING:
    from dataeff.rgnn.layer import Layer


def explain(layer: Layer, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Programs after each pass, then the forward and backward programs that run."""
    plan = layer.plan(graph, *args, **kwargs)
    parts = [f"layer {layer.name} on {graph!r}"]
    parts.append(
        f"(source, relation) pairs per edge {graph.src_pair_ratio:.3f},"
        f" (destination, relation) pairs per edge {graph.dst_pair_ratio:.3f}"
    )
    parts += [f"== {name} ==\n{render(program)}" for name, program in plan.stages]
    parts.append(f"== forward ==\n{render(plan.forward)}")
    if plan.backward is not None:
        parts.append(f"== backward ==\n{render(plan.backward)}")
    return "\n".join(parts)
