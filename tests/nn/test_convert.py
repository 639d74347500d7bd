import pytest
import torch

from dataeff import nn

pyg = pytest.importorskip("torch_geometric.nn")

METADATA = (["a", "b"], [("a", "to", "b"), ("b", "to", "a")])


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = pyg.RGCNConv(6, 8, 3, num_bases=2)
        self.stack = torch.nn.ModuleList(
            [pyg.FastRGCNConv(8, 8, 3, aggr="add"), pyg.RGATConv(8, 4, 3, heads=2, edge_dim=2)]
        )
        self.tied = self.stack[0]
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x, index, etype, attr):
        x = self.first(x, index, etype).relu()
        x = self.tied(self.stack[0](x, index, etype), index, etype)
        return self.head(self.stack[1](x, index, etype, edge_attr=attr))


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 12, (2, 50), generator=g)
    etype = torch.randint(0, 3, (50,), generator=g)
    return torch.randn(12, 6, generator=g), index, etype, torch.randn(50, 2, generator=g)


def test_a_model_keeps_its_results_parameters_and_optimiser(inputs):
    torch.manual_seed(0)
    model = Net().eval()
    model.first.weight.requires_grad_(False)
    before, names = model(*inputs), {n: p for n, p in model.named_parameters()}
    state = set(model.state_dict())
    report = nn.convert(model)
    assert [name for name, *_ in report.swapped] == ["first", "stack.0", "stack.1", "tied"]
    assert not report.left and "stack.0: FastRGCNConv -> RGCNConv(8, 8" in str(report)
    assert model.tied is model.stack[0] and isinstance(model.stack[1], nn.RGATConv)
    torch.testing.assert_close(model(*inputs), before, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == state
    assert all(p is names[n] for n, p in model.named_parameters())
    assert not model.first.training and not model.first.weight.requires_grad
    assert str(nn.convert(model)) == "nothing to convert"


def test_hgt(inputs):
    model = torch.nn.ModuleDict({"hgt": pyg.HGTConv({"a": 3, "b": 4}, 8, METADATA, heads=2)})
    x = {"a": torch.randn(5, 3), "b": torch.randn(6, 4)}
    edges = {e: torch.randint(0, 5, (2, 20)) for e in METADATA[1]}
    before = model["hgt"](x, edges)
    assert len(nn.convert(model).swapped) == 1
    for name, rows in model["hgt"](x, edges).items():
        torch.testing.assert_close(rows, before[name], rtol=1e-5, atol=1e-5)


class Own(pyg.RGCNConv):
    """Might compute anything."""


def stays(layer):
    """The reason why a layer stays as it is."""
    model = torch.nn.Sequential(layer)
    report = nn.convert(model)
    assert model[0] is layer and not report.swapped
    ((name, kind, reason),) = report.left
    assert (name, kind) == ("0", type(layer).__name__)
    return reason


def oddly_summed(layer):
    layer.aggr = "max"
    return layer


def test_what_stays_and_why():
    assert "subclass" in stays(Own(4, 4, 2))
    assert "flow='target_to_source'" in stays(pyg.RGCNConv(4, 4, 2, flow="target_to_source"))
    assert "'median'" in stays(pyg.RGATConv(4, 4, 2, aggr="median"))
    assert "aggr='max'" in stays(oddly_summed(pyg.HGTConv(4, 4, METADATA)))
    assert "run it once" in stays(pyg.HGTConv(-1, 4, METADATA))
    assert "median" in stays(pyg.RGCNConv(4, 4, 2, aggr="median"))
    hooked = pyg.RGCNConv(4, 4, 2)
    hooked.register_forward_hook(lambda *_: None)
    assert "hooks" in stays(hooked)
    observed = pyg.RGCNConv(4, 4, 2)
    observed.register_message_forward_hook(lambda *_: None)
    assert "hooks" in stays(observed)


def test_a_layer_whose_method_was_replaced_stays():
    patched = pyg.RGCNConv(4, 4, 2)
    patched.message = patched.message
    assert "message of this one" in stays(patched)


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
        nn.convert(3)


def test_a_layer_with_a_buffer_of_its_own_stays():
    marked = pyg.RGCNConv(4, 4, 2)
    marked.register_buffer("seen", torch.zeros(1))
    assert "seen, added to it" in stays(marked)


def test_layers_of_a_hetero_conv_are_swapped():
    kinds = ("a", "to", "b"), ("b", "to", "a"), ("a", "likes", "b")
    model = pyg.HeteroConv({kind: pyg.RGCNConv((4, 4), 4, 2) for kind in kinds})
    x = {name: torch.randn(5, 4) for name in "ab"}
    edges = {kind: torch.randint(0, 5, (2, 9)) for kind in kinds}
    types = {kind: torch.randint(0, 2, (9,)) for kind in kinds}
    want = model(x, edges, types)
    assert len(nn.convert(model).swapped) == 3
    torch.testing.assert_close(model(x, edges, types), want)


def test_a_model_made_by_to_hetero_stays():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = pyg.RGCNConv(4, 4, 2)

        def forward(self, x, edge_index, edge_type):
            return self.conv(x, edge_index, edge_type)

    model = pyg.to_hetero(Layer(), METADATA)
    report = nn.convert(model)
    assert len(report.left) == 2 and not report.swapped
    assert all("HeteroConv instead" in reason for *_, reason in report.left)


def test_a_lone_layer():
    layer = pyg.RGCNConv(4, 4, 2)
    with pytest.raises(ValueError, match="from_pyg"):
        nn.convert(layer)
    assert nn.from_pyg(layer).weight is layer.weight
    with pytest.raises(TypeError, match="GCNConv"):
        nn.from_pyg(pyg.GCNConv(4, 4))
