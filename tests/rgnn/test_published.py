"""RGCN, RGAT and HGT as the examples write them: how long they are, and that they are right."""

import importlib.util
import inspect
import math
from pathlib import Path

import pytest
import torch

from dataeff import nn, rgnn
from dataeff.nn.published import PUBLISHED
from dataeff.rgnn import Layer

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    path = EXAMPLES / f"explain_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.example()


def test_three_layers_take_at_most_51_lines():
    """As many as Hector's (arXiv 2301.06284, section 1)."""
    layers = [example(name)[0] for name in ("rgcn", "rgat", "hgt")]
    lines = [len(inspect.getsource(layer.function).splitlines()) for layer in layers]
    assert len(lines) == 3 and sum(lines) <= 51


def test_rgcn_is_the_drop_in():
    layer, graph, (x, W, root, bias) = example("rgcn")
    conv = nn.RGCNConv(64, 64, 8)
    conv.load_state_dict({"weight": W, "root": root, "bias": bias})
    torch.testing.assert_close(layer(graph, x, W, root, bias), conv(x, graph), rtol=1e-4, atol=1e-4)


def test_rgat_is_the_formula():
    layer, graph, (x, W, a_src, a_dst) = example("rgat")
    src, dst, etype = *graph.edge_index, graph.edge_type
    z = [torch.einsum("ei,eio->eo", x[end], W[etype]) for end in (src, dst)]
    score = (z[0] * a_src[etype]).sum(1) + (z[1] * a_dst[etype]).sum(1)
    weight = torch.exp(torch.nn.functional.leaky_relu(score, 0.2).double())
    total = torch.zeros(len(x), dtype=torch.double).index_add(0, dst, weight)
    want = torch.zeros(len(x), 64, dtype=torch.double)
    want = want.index_add(0, dst, (weight / total[dst])[:, None] * z[0])
    got = layer(graph, x, W, a_src, a_dst)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_hgt_is_the_drop_in():
    layer, graph, (x, K, Q, V, A, M, prior) = example("hgt")
    layout = graph.layout
    conv = nn.HGTConv(64, 64, (list(layout.node_types), list(layout.edge_types)), heads=4)
    state = conv.state_dict()
    for t, name in enumerate(layout.node_types):
        kqv = torch.cat([w[t].reshape(64, 64) for w in (K, Q, V)], dim=1)
        state[f"kqv_lin.lins.{name}.weight"] = kqv.t()
        state[f"kqv_lin.lins.{name}.bias"] = torch.zeros(192)
    for weight, name in ((A, "k_rel.weight"), (M, "v_rel.weight")):
        state[name] = weight.transpose(0, 1).reshape(-1, 16, 16)
    conv.load_state_dict(state)
    assert float(prior[0, 0]) == math.sqrt(1 / 16)
    rows = layer(graph, x, K, Q, V, A, M, prior).flatten(1)
    got = conv(layout.split(x), graph)
    for name, have in layout.split(rows).items():
        want = conv.out_lin.lins[name](torch.nn.functional.gelu(have))
        share = conv.skip[name].sigmoid()
        want = share * want + (1 - share) * layout.split(x)[name]
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-4)


def convs():
    """A module for each published layer, 32 wide with 2 heads, and its arguments but the graph."""
    types, relations = ["a", "b"], [("a", "r", "b"), ("b", "s", "a"), ("b", "t", "b")]
    typed = nn.HGTConv(32, 32, (types, relations), heads=2)
    ends = {r: torch.randint(10, (2, 30)) for r in relations}
    by_type = rgnn.Graph.from_typed(ends, dict.fromkeys(types, 10))
    graph = rgnn.Graph(torch.randint(20, (2, 90)), torch.arange(90) % 4, num_nodes=20)
    x = torch.randn(20, 32)
    return {
        "rgcn": (nn.RGCNConv(32, 32, 4), x, graph),
        "rgat": (nn.RGATConv(32, 16, 4, heads=2), x, graph),
        "hgt": (typed, by_type.layout.split(x), by_type),
        "simple_hgn": (nn.SimpleHGNConv(32, 16, 4, 16, heads=2, bias=False), x, graph),
        "comp_gcn": (nn.CompGCNConv(32, 32, 2, "mult", norm=True), x, torch.randn(4, 32), graph),
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_compiled_ahead_of_time_is_what_the_module_runs(name, monkeypatch):
    conv, *given, graph = convs()[name]
    found, run = PUBLISHED[name], []
    call = Layer.__call__

    def recorded(self, *args, **kwargs):
        run.append((self, *self.bind(args[0], args[1:], kwargs)))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Layer, "__call__", recorded)
    conv(*given, graph)
    ((layer, tensors, statics),) = run
    assert layer is found.layer
    relations, types = graph.num_relations, graph.num_node_types
    shapes = found.shapes(20, types, relations, 32, 2, 16)
    assert {k: tuple(t.shape) for k, t in tensors.items()} == shapes
    random = torch.Generator().manual_seed(0)
    made = {k: torch.randn(s, generator=random) for k, s in shapes.items()}
    want = layer(graph, **made, **dict(statics))
    got = layer(graph, **made, **found.statics(2))
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (got, want)), strict=True):
        assert torch.equal(a, b)
