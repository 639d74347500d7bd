"""Layers that have run, and models that hold them: copied, pickled, saved, loaded, converted."""

import copy
import io
import pickle

import pytest
import torch

from dataeff import nn, rgnn

NODES, RELATIONS, WIDTH = 30, 4, 8
NODE_TYPES = ["a", "b"]
EDGE_TYPES = [("a", "x", "b"), ("b", "y", "a")]


def _edges():
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, NODES, (2, 90), generator=g), torch.randint(
        0, RELATIONS, (90,), generator=g
    )


def _typed_edges():
    index, _ = _edges()
    return {EDGE_TYPES[0]: index[:, :50], EDGE_TYPES[1]: index[:, 50:]}


def _x():
    return torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(5))


def _relation():
    g = torch.Generator().manual_seed(6)
    return torch.randn(2 * (RELATIONS // 2), WIDTH, generator=g)


# What makes each layer, and what it is called with.
LAYERS = {
    "RGCNConv": (lambda: nn.RGCNConv(WIDTH, WIDTH, RELATIONS), lambda: (_x(), *_edges())),
    "RGCNConv bases": (
        lambda: nn.RGCNConv(WIDTH, WIDTH, RELATIONS, num_bases=2),
        lambda: (_x(), *_edges()),
    ),
    "RGATConv": (lambda: nn.RGATConv(WIDTH, WIDTH, RELATIONS), lambda: (_x(), *_edges())),
    "HGTConv": (
        lambda: nn.HGTConv(WIDTH, WIDTH, (NODE_TYPES, EDGE_TYPES), heads=2),
        lambda: (dict.fromkeys(NODE_TYPES, _x()), _typed_edges()),
    ),
    "HGTConv lazy": (
        lambda: nn.HGTConv(-1, WIDTH, (NODE_TYPES, EDGE_TYPES)),
        lambda: (dict.fromkeys(NODE_TYPES, _x()), _typed_edges()),
    ),
    "SimpleHGNConv": (
        lambda: nn.SimpleHGNConv(WIDTH, WIDTH, RELATIONS, rel_channels=4),
        lambda: (_x(), *_edges()),
    ),
    "CompGCNConv": (
        lambda: nn.CompGCNConv(WIDTH, WIDTH, RELATIONS // 2),
        lambda: (_x(), _relation(), *_edges()),
    ),
}


class Model(torch.nn.Module):
    """A model that holds a layer, twice, and a graph of its own."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.tied = conv, conv
        self.graph = rgnn.Graph(*_edges(), num_nodes=NODES)

    def forward(self, *args):
        return self.conv(*args)


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _loaded(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(torch.load(buffer))
    return other


COPIES = {
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _saved,
    "state_dict": _loaded,
}


def _values(result):
    if isinstance(result, dict):
        return [*result.values()]
    return [*result] if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("held", [False, True], ids=["layer", "model"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_has_run_is_copied(name, how, held):
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    model, args = (Model(make()) if held else make()), inputs()
    trained = _values(model(*args))
    sum(v.sum() for v in trained).backward()  # with all that a first run leaves
    with torch.no_grad():
        want = _values(model(*args))
    for have, value in zip(want, trained, strict=True):
        torch.testing.assert_close(have, value.detach())
    other = COPIES[how](model)
    if held and how != "copy.copy":
        assert other.tied is other.conv is not model.conv
    assert repr(other) == repr(model) and list(other.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for have, value in zip(_values(other(*args)), want, strict=True):
            assert torch.equal(have, value)
    if how == "copy.copy":  # it shares its parameters
        return
    sum(v.sum() for v in _values(other(*args))).backward()
    for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), n
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
        for have, value in zip(_values(model(*args)), want, strict=True):
            assert torch.equal(have, value)  # the first one has its own
        assert any(
            not torch.equal(have, value)
            for have, value in zip(_values(other(*args)), want, strict=True)
        )


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["RGCNConv", "RGATConv", "HGTConv"])
def test_a_converted_model_is_copied(name, how):
    pyg = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    kinds = (NODE_TYPES, EDGE_TYPES) if name == "HGTConv" else RELATIONS
    theirs, args = Model(getattr(pyg, name)(WIDTH, WIDTH, kinds)), LAYERS[name][1]()
    with torch.no_grad():
        want = _values(theirs(*args))
    other = COPIES[how](theirs)  # converted after it was copied, and copied after that
    report = nn.convert(other)
    assert [s[0] for s in report.swapped] == ["conv", "tied"] and not report.left
    for model in (other, COPIES[how](other)):
        assert type(model.conv).__module__.startswith("dataeff")
        with torch.no_grad():
            for have, value in zip(_values(model(*args)), want, strict=True):
                torch.testing.assert_close(have, value)
        assert str(nn.convert(model)) == "nothing to convert"
