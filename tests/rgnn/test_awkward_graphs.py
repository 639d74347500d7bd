"""The GPU's kernels on awkward graphs, in Triton's interpreter: traversals and typed products."""

import pytest
import torch
from rgnn_layers import STATICS, rgat, rgcn_mean, tensors, typed_graph
from test_backends import compare

from dataeff.nn.comp_gcn_conv import comp_gcn
from dataeff.nn.hgt_conv import hgt
from dataeff.nn.simple_hgn_conv import simple_hgn
from dataeff.rgnn.view import View

pytest.importorskip("triton")


def many_relations():
    """500 relations on 40 edges: most are empty, and the others have one edge or two."""
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, 9, (2, 40), generator=g), torch.randint(0, 500, (40,), generator=g)


ZEROS = torch.zeros(2, 6, dtype=torch.long)
CASES = {
    "500 relations": (*many_relations(), 9, 500),
    "one relation, isolated nodes": (
        torch.arange(20).view(2, 10) % 5,
        torch.zeros(10, dtype=torch.long),
        9,
        1,
    ),
    "one node, loops, duplicates": (ZEROS, torch.tensor([0, 2, 2, 0, 2, 2]), 1, 4),
}


@pytest.mark.parametrize(
    "layer", [rgcn_mean, rgat, hgt, simple_hgn, comp_gcn], ids=lambda f: f.name
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_forward_and_backward(layer, case, monkeypatch):
    from dataeff.kernels import interpreter, typed_gemm

    _, etype, nodes, relations = case
    graph = typed_graph(case)
    named = tensors(layer, nodes, etype.numel(), relations, torch.float32, 16, 16)
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "triton")
    plan = layer.plan(graph, **named, **STATICS.get(layer, {}))
    view = View(graph, plan.sizes)
    with interpreter.interpreted(typed_gemm):
        values = compare(plan.compiled.forward, view, named, torch.float32, 2e-5)
        outputs, saved = values[: plan.compiled.num_outputs], values[plan.compiled.num_outputs :]
        named |= {f"grad:{k}": torch.randn_like(v) for k, v in enumerate(outputs)}
        named |= {f"output:{k}": v for k, v in enumerate(outputs)}
        named |= {f"saved:{k}": v for k, v in enumerate(saved)}
        compare(plan.compiled.backward, view, named, torch.float32, 2e-4)


def test_a_second_layer_builds_no_tile_map(monkeypatch):
    from dataeff.kernels import interpreter, typed_gemm
    from dataeff.rgnn import tilemap

    built = []
    build = tilemap.build_tile_map
    monkeypatch.setattr(tilemap, "build_tile_map", lambda *a: built.append(a) or build(*a))
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "triton")
    case = CASES["one node, loops, duplicates"]
    graph = typed_graph(case)
    counts, nbytes = [], []
    with interpreter.interpreted(typed_gemm):
        for _ in range(2):
            named = tensors(rgat, case[2], case[1].numel(), case[3], torch.float32, 16, 16)
            plan = rgat.plan(graph, **named, **STATICS.get(rgat, {}))
            compare(plan.compiled.forward, View(graph, plan.sizes), named, torch.float32, 2e-5)
            counts.append(len(built))
            nbytes.append(graph.nbytes)
    assert counts[0] == counts[1] > 0
    assert nbytes[0] == nbytes[1]
