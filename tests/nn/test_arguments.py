import pytest
import torch

from dataeff import nn, rgnn

EDGES = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.tensor([0, 1, 0])
LAYERS = {
    "RGCNConv": lambda: nn.RGCNConv(4, 6, 2),
    "RGATConv": lambda: nn.RGATConv(4, 6, 2, edge_dim=3),
    "SimpleHGNConv": lambda: nn.SimpleHGNConv(4, 6, 2, 3),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(3, 5), (3,), (3, 4, 1)])
def test_wrong_features_are_a_value_error_with_both_widths(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: x has shape .* takes 4 features per row"):
        LAYERS[name]()(torch.randn(shape), *EDGES)


@pytest.mark.parametrize("widths", [-1, (-1, 4), (4, -1)], ids=str)
def test_a_width_that_rgcn_should_take_from_its_input(widths):
    with pytest.raises(ValueError, match=r"RGCNConv: in_channels is .*-1.*number of features"):
        nn.RGCNConv(widths, 6, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.RGATConv(-1, 6, 2),
        lambda: nn.SimpleHGNConv(-1, 6, 2, 3),
        lambda: nn.CompGCNConv(-1, 6, 2),
    ],
)
def test_a_width_that_others_should_take_from_their_input(make):
    with pytest.raises(ValueError, match=r"Conv: in_channels is -1; give the number of features"):
        make()


def test_two_widths_where_sources_and_destinations_have_one():
    with pytest.raises(TypeError, match=r"RGATConv: in_channels is \(4, 5\); .* have one"):
        nn.RGATConv((4, 5), 6, 2)


def test_features_of_other_arguments():
    with pytest.raises(ValueError, match=r"x of the destinations has shape .* takes 5 features"):
        nn.RGCNConv((4, 5), 6, 2)((torch.randn(3, 4), torch.randn(3, 4)), *EDGES)
    with pytest.raises(ValueError, match=r"edge_attr has shape .* takes 3 features"):
        nn.RGATConv(4, 6, 2, edge_dim=3)(torch.randn(3, 4), *EDGES, torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"x has shape .* takes 4 features"):
        nn.CompGCNConv(4, 6, 1)(torch.randn(3, 5), torch.randn(2, 4), *EDGES)


@pytest.mark.parametrize("widths", [4, {"a": 4, "b": 5}], ids=str)
def test_features_of_a_node_type(widths):
    key = ("a", "r", "b")
    conv = nn.HGTConv(widths, 6, (["a", "b"], [key]))
    x = {"a": torch.randn(3, 4), "b": torch.randn(3, 3)}
    with pytest.raises(ValueError, match=r"HGTConv: x of 'b' has shape .* features per row"):
        conv(x, {key: EDGES[0]})


@pytest.mark.parametrize("name", LAYERS)
def test_edges_in_pyg_s_own_types(name):
    torch_geometric = pytest.importorskip("torch_geometric")
    edge_index, edge_type = EDGES
    wrapped = torch_geometric.EdgeIndex(edge_index, sparse_size=(3, 3))
    conv, x = LAYERS[name](), torch.randn(3, 4)
    extra = (torch.randn(3, 3),) if name == "RGATConv" else ()
    expected = conv(x, edge_index, edge_type, *extra)
    actual = conv(x, wrapped, torch_geometric.Index(edge_type), *extra)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "x",
    [torch.randn(3, 4).cfloat(), torch.ones(3, dtype=torch.bool)],
    ids=["complex", "bool"],
)
@pytest.mark.parametrize("name", ["RGCNConv", "RGATConv"])
def test_features_that_are_no_numbers_to_compute_with(name, x):
    with pytest.raises(TypeError, match=rf"{name} needs floating-point features.*got {x.dtype}"):
        LAYERS[name]()(x, *EDGES)


@pytest.mark.parametrize("name", ["RGCNConv", "RGATConv"])
def test_sparse_features_are_refused(name):
    conv = {"RGCNConv": nn.RGCNConv, "RGATConv": nn.RGATConv}[name](4, 6, 2)
    with pytest.raises(TypeError, match=r"argument x must be dense, got torch.sparse_coo"):
        conv(torch.randn(3, 4).to_sparse(), *EDGES)


def test_edges_without_values_are_refused():
    edges = [each.to("meta") for each in EDGES]
    with pytest.raises(ValueError, match="edge_index is on the meta device"):
        nn.RGCNConv(4, 6, 2).to("meta")(torch.randn(3, 4, device="meta"), *edges)
    key = ("a", "r", "a")
    conv = nn.HGTConv(4, 6, (["a"], [key])).to("meta")
    with pytest.raises(ValueError, match="is on the meta device"):
        conv({"a": torch.randn(3, 4, device="meta")}, {key: edges[0]})


@pytest.mark.parametrize("name", ["RGCNConv", "RGATConv", "SimpleHGNConv"])
@pytest.mark.parametrize("given", [[[1.0, 2.0]], {"a": torch.randn(3, 4)}], ids=["list", "dict"])
def test_features_that_are_no_tensor(name, given):
    with pytest.raises(TypeError, match=rf"{name}: x must be a tensor, got (list|dict)"):
        LAYERS[name]()(given, *EDGES)


def test_more_than_sources_and_destinations():
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match="RGATConv: x is a tensor or a pair of them, got 3"):
        nn.RGATConv(4, 6, 2)((x, x, x), *EDGES)


def test_edges_of_nodes_without_features():
    key = ("a", "r", "b")
    conv, x = nn.HGTConv(4, 6, (["a", "b"], [key])), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"x_dict has no features of 'b' nodes, which edges .*'r'"):
        conv({"a": x}, {key: EDGES[0]})
    with pytest.raises(TypeError, match="HGTConv: x of 'b' must be a tensor, got NoneType"):
        conv({"a": x, "b": None}, {key: EDGES[0]})
    assert conv({"a": x}, {key: EDGES[0][:, :0]}) == {}


@pytest.mark.parametrize("relations", [2, 3])
def test_a_graph_of_as_many_relations_as_the_layer_or_fewer(relations):
    conv, x = nn.RGCNConv(4, 6, 3), torch.randn(3, 4)
    graph = rgnn.Graph(*EDGES, num_nodes=3, num_relations=relations)
    torch.testing.assert_close(conv(x, graph), conv(x, *EDGES))


@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_of_more_relations_than_the_layer(name):
    graph = rgnn.Graph(*EDGES, num_nodes=3, num_relations=3)
    with pytest.raises(ValueError, match="the graph has 3 relations, the layer 2"):
        LAYERS[name]()(torch.randn(3, 4), graph)
