"""Layers on plain edges inside a `torch.compile`d model, as code written for PyG calls them."""

import pytest
import torch

from dataeff import nn, rgnn

# Dynamo makes an instance of the autograd function while it traces it.
# It also asks resumed frames for gradients of what is no leaf, and hides the warning from users.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
)

KINDS = [("a", "to", "b"), ("b", "to", "a"), ("b", "likes", "b")]


class Homogeneous(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.RGCNConv(6, 5, 4), nn.RGATConv(5, 3, 4)

    def forward(self, x, edge_index, edge_type):
        x = self.first(x, edge_index, edge_type).relu()
        return self.second(x, edge_index, edge_type)


class Typed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.HGTConv(6, 4, (["a", "b"], KINDS), heads=2)

    def forward(self, x, edges):
        return torch.cat(list(self.conv(x, edges).values()))


class Embedded(torch.nn.Module):
    """Node ids as features, as in PyG's example of RGCN."""

    def __init__(self):
        super().__init__()
        self.conv = nn.RGCNConv(100, 5, 4, num_bases=2)

    def forward(self, ids, edge_index, edge_type):
        own = self.conv(ids, edge_index, edge_type)
        return own[: len(ids)] + self.conv(None, edge_index, edge_type)[: len(ids)]


def embedded(step):
    e = 380 + 5 * step
    return torch.randperm(100), torch.randint(100, (2, e)), torch.randint(4, (e,))


def homogeneous(step):
    n, e = 100 + 3 * step, 380 + 5 * step
    return torch.randn(n, 6), torch.randint(n, (2, e)), torch.randint(4, (e,))


def typed(step):
    counts = {"a": 50 + step, "b": 60 + 2 * step}
    edges = {
        k: torch.stack([torch.randint(counts[end], (90 + step,)) for end in k[::2]]) for k in KINDS
    }
    return {t: torch.randn(n, 6) for t, n in counts.items()}, edges


@pytest.mark.parametrize(
    ("model", "inputs"), [(Homogeneous, homogeneous), (Typed, typed), (Embedded, embedded)]
)
def test_compiled_models_take_plain_edges(model, inputs):
    made = []

    def backend(module, example_inputs):
        made.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = model()
    compiled = torch.compile(plain, backend=backend)
    for step in range(6):
        args = inputs(step)
        got, want = compiled(*args), plain(*args)
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad(got.sum(), plain.parameters(), allow_unused=True)
        for a, b in zip(
            grads,
            torch.autograd.grad(want.sum(), plain.parameters(), allow_unused=True),
            strict=True,
        ):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
        if step == 2:
            settled = len(made)
    assert len(made) == settled  # the first sizes as numbers, then symbols for all that follow


@pytest.mark.parametrize(("model", "inputs"), [(Homogeneous, homogeneous), (Typed, typed)])
def test_one_graph_without_a_break_asks_for_a_prepared_graph(model, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(model(), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"rgnn\.Graph\(\.\.\.\)\.prepare"):
        compiled(*inputs(0))


def test_one_graph_of_node_ids_without_a_break_asks_for_features():
    torch._dynamo.reset()
    ids, index, etype = embedded(0)
    graph = rgnn.Graph(index, etype, num_nodes=100, num_relations=4).prepare()
    compiled = torch.compile(nn.RGCNConv(100, 5, 4), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.nn\.Embedding"):
        compiled(ids, graph)


def test_numbers_of_a_layer_are_constants_where_every_size_is_dynamic():
    torch._dynamo.reset()
    conv = nn.RGATConv(6, 4, 4, heads=2)
    compiled = torch.compile(conv, fullgraph=True, dynamic=True, backend="eager")
    for step, slope in enumerate([0.2, 0.2, 0.7]):
        conv.negative_slope = slope
        x, edge_index, edge_type = homogeneous(step)
        graph = rgnn.Graph(edge_index, edge_type, num_nodes=x.shape[0], num_relations=4).prepare()
        torch.testing.assert_close(compiled(x, graph), conv(x, graph))
