"""What the language refuses while it traces, and a layer that uses most of what it has."""

import numpy as np
import pytest
import torch

from dataeff import rgnn
from dataeff.rgnn.symbols import Argument
from dataeff.rgnn.tracer import RowCounts, Tracer


@pytest.fixture
def typed():
    """Nodes of two types, three relations; x [9, 4], a weight by type or relation, edge values."""
    g = torch.Generator().manual_seed(0)
    nodes = {"a": 5, "b": 4}
    relations = [("a", "r", "b"), ("b", "s", "a"), ("a", "t", "a")]
    edges = {
        r: torch.stack([torch.randint(0, nodes[r[k]], (6,), generator=g) for k in (0, 2)])
        for r in relations
    }
    return rgnn.Graph.from_typed(edges, nodes)


ARGUMENTS = {
    "x": (9, 4),
    "W": (3, 4, 5),
    "K": (2, 4, 5),
    "r": (3, 4),
    "e": (18, 4),
    "U": (4, 5),
    "s": (),
}

REFUSED = [
    (lambda g, x, **_: g.src(x) + g.at_dst(x), r"edge\[4\] is an edge|dst\[4\] is a destination"),
    (lambda g, x, **_: g.sum(g.at_dst(x)), r"g.sum needs an edge or .* got dst\[4\]"),
    (lambda g, x, **_: g.mean(g.node(x)), r"g.mean needs an edge .* got node\[4\]"),
    (lambda g, x, **_: g.src(g.src(x)), r"g.src needs a node value, got edge\[4\]"),
    (lambda g, x, **_: g.sum(g.src(g.sum(g.src(x)))), r"got dst\[4\]: .* for a second hop"),
    # It would be 9 x 9 x 4 numbers.
    (lambda g, x, **_: x / g.in_degree(), r"x, \[9, 4\], stands on its own.* g.at_dst"),
    (lambda g, x, **_: g.out_degree() * x, r"x, \[9, 4\], stands on its own"),
    (lambda g, x, e, **_: g.sum(g.src(x) * e), r"argument e stands .* g.edge\(e\) reads a row"),
    (lambda g, x, e, **_: rgnn.concat(g.sum(g.edge(e)), x), r"argument x stands .* g.at_dst\(x\)"),
    (
        lambda g, x, U, **_: g.sum(rgnn.linear(g.src(x), U[g.etype])),
        r"must be the input's row shape; before them it has an axis of types",
    ),
    (lambda g, x, **_: g.node(g.src(x)), r"g.node needs a node value, got edge\[4\]"),
    (lambda g, x, **_: g.at_dst(g.src(x)), r"g.at_dst needs a node or .* got edge\[4\]"),
    (lambda g, x, **_: g.mean_per_relation(g.node(x)), r"g.mean_per_relation needs an edge value"),
    (lambda g, x, **_: g.dst(g.src(x)), r"g.dst needs a node or destination .* got edge\[4\]"),
    (lambda g, x, **_: g.edge(g.node(x)), r"g.edge needs an edge value, got node\[4\]"),
    (lambda g, x, **_: rgnn.edge_softmax(g.node(x)), r"edge_softmax needs an edge .* node\[4\]"),
    (
        lambda g, x, **_: g.per_relation.sum(g.node(x)),
        r"relation.sum needs an edge value, got node\[4\]",
    ),
    (
        lambda g, x, K, **_: rgnn.linear(g.src(x), K[g.ntype]),
        r"edge\[4\] have no node type .*; multiply the nodes, before g.src",
    ),
    (
        lambda g, x, W, **_: rgnn.linear(g.src(x), W),
        r"weight one\[3x4x5\]: .*; one weight per relation is picked by W\[g.etype\]",
    ),
    (lambda g, x, r, **_: g.src(x) * r, r"\[4\] and \[3, 4\] do not .* picked by p\[g.etype\]"),
    (lambda g, x, W, **_: rgnn.linear(g.node(x), W[g.etype]), r"node\[4\] have no relation"),
    (lambda g, x, r, **_: g.node(x) * r[g.etype], r"etype\[4\] is a relation value"),
    (lambda g, x, U, **_: rgnn.linear(rgnn.linear(g.src(x), U), U), r"edge\[5\].*one\[4x5\]"),
    (lambda g, x, U, **_: rgnn.linear(g.src(x), 3.0), r"expected a parameter, got 3.0"),
    (
        lambda g, x, e, U, **_: g.edge(e) + rgnn.linear(g.src(x), U),
        r"edge\[4\] and edge\[5\]: .*broad",
    ),
    (
        lambda g, x, e, U, **_: rgnn.dot(g.edge(e), rgnn.linear(g.src(x), U)),
        r"edge\[4\] and edge\[5\]",
    ),
    (lambda g, x, **_: rgnn.concat(g.src(x), g.at_dst(x)), r"used with a"),
    (lambda g, x, **_: rgnn.split(g.src(x), (1, 2)), r"\[1, 2\] do not add up .* edge\[4\]"),
    (lambda g, x, **_: rgnn.split(g.src(x), 2), r"split needs the size of each part"),
    (lambda g, x, **_: torch.relu(g.src(x)), r"torch's relu takes .*: use rgnn.relu"),
    (lambda g, x, **_: torch.cat([g.src(x), g.dst(x)]), r"torch's cat takes .*: use the functions"),
    (lambda g, x, **_: g.src(x) if g.src(x) else x, r"has no truth while it is traced"),
    (lambda g, x, **_: g.src(x) ** 0.3, r"cannot raise edge\[4\] to 0.3"),
    (lambda g, x, **_: g.src(x) ** g.src(x), r"cannot raise edge\[4\] to a value"),
    (lambda g, x, **_: rgnn.reshape(g.src(x), 3, -1), r"cannot reshape edge\[4\]"),
    (lambda g, x, **_: rgnn.outer(rgnn.reshape(g.src(x), 2, 2), g.src(x)), r"edge\[2x2\]"),
    (lambda g, x, **_: rgnn.dot(g.in_degree(), g.in_degree()), r"dot needs an axis"),
    (lambda g, x, **_: g.src(x) + "one", r"cannot compute with 'one' of type str"),
    (lambda g, x, W, **_: rgnn.linear(g.src(x), W[0]), r"indexed with g.etype or g.ntype, not"),
    (
        lambda g, x, **_: g.sum(g.src(x) > 0),
        r"edge\[4\] and 0: .* cannot compare symbols; rgnn.pos",
    ),
    (lambda g, x, **_: g.sum(g.src(x) == g.dst(x)), r"edge\[4\] and .* edge\[4\]: .* compare"),
    (
        lambda g, x, **_: g.sum(g.src(x)[:, :2]),
        r"edge\[4\] and .*: .* parts of a symbol .* rgnn.spl",
    ),
    (lambda g, x, W, **_: W[g.etype][0], r"etype\[4x5\] and 0: .* rgnn.split"),
    (lambda g, x, **_: [v for v in g.src(x)], r"edge\[4\]: .* rgnn.split cuts the last axis"),
    (lambda g, x, U, **_: g.sum(g.src(x) @ U), r"edge\[4\] and argument U: .*use rgnn.linear"),
    (
        lambda g, x, s, **_: float(s) * g.sum(g.src(x)),
        r"argument s: .*numbers as constant arguments",
    ),
    (lambda g, x, **_: g.sum(abs(g.src(x))), r"edge\[4\]: .*cannot use this operator"),
    (lambda g, x, **_: g.sum(2 ** g.src(x)), r"edge\[4\] and 2: .*cannot use this operator"),
    (lambda g, x, **_: g.src(x).view(2, 2), r"edge\[4\] has no attribute 'view': use rgnn.reshape"),
    (lambda g, x, **_: g.src(x).relu(), r"edge\[4\] has no attribute 'relu': use rgnn.relu"),
    (
        lambda g, x, **_: g.src(x).__setitem__(0, 1),
        r"edge\[4\] and 0 and 1: .*change a symbol in pl",
    ),
    (lambda g, x, **_: x.shape, r"argument x has no attribute 'shape'"),
    (lambda g, x, **_: g.min(g.src(x)), r"there is no g\.min; there are .*degree_norm, .*max, "),
    (lambda g, x, **_: g.per_relation.min(x), r"no g\.per_relation\.min; there are max, mean, sum"),
    (
        lambda g, x, **_: g.src(x) * torch.ones(4),
        r"a Tensor of shape \[4\] that is not an argument",
    ),
    (lambda g, x, **_: np.ones(4) * g.src(x), r"a ndarray of shape \[4\] that is not an argument"),
    (
        lambda g, x, **_: g.src(torch.ones(9, 4)),
        r"a Tensor of shape \[9, 4\] that is not an argument",
    ),
    (lambda g, x, **_: rgnn.linear(g.src(x), torch.ones(4, 5)), r"a Tensor of shape \[4, 5\] that"),
    (lambda g, x, **_: g.src(x) * float("inf"), r"cannot compute with inf: constants are finite"),
    (
        lambda g, x, **_: rgnn.leaky_relu(g.src(x), x),
        r"negative_slope is a finite number, got argum",
    ),
    (
        lambda g, x, **_: rgnn.exp(3.0),
        r"values of a layer that is being traced, got 3.0 of type fl",
    ),
    (
        lambda g, x, **_: torch.nn.functional.leaky_relu(g.src(x)),
        r"torch's leaky_relu takes tensors, .*: use rgnn.leaky_relu",
    ),
    (lambda g, x, **_: rgnn.concat(), r"values of a layer that is being traced, got none"),
    (lambda g, x, **_: rgnn.concat(g.src(x), 3.0), r"concat needs values with an axis .* edge\[\]"),
    (lambda g, x, **_: rgnn.reshape(g.src(x), 2.0, 2), r"reshape of edge\[4\] needs whole numbers"),
    (
        lambda g, x, **_: rgnn.reshape(g.src(x), -1, -1),
        r"reshape of edge\[4\] needs whole .* \(-1, -1",
    ),
    (
        lambda g, x, W, **_: rgnn.linear(g.src(x), rgnn.reshape(W[g.etype], 1, 4, 5)),
        r"edge\[4\] and weight etype\[1x4x5\]: .*; for heads of one input, join them in the weight",
    ),
]

# What a function holds besides its arguments; a comparison took one branch, and said nothing.
HELD = [torch.ones(3, 4, 5), np.ones((3, 4, 5)), [1.0, 2.0, 3.0], {0: 1.0}]
REFUSED += [
    (lambda g, x, held=held, **_: held[g.etype], r"g.etype picks from arguments of the layer")
    for held in HELD
]
REFUSED += [
    (lambda g, x, **_: g.src(x) if g.ntype == 0 else g.dst(x), r"g.ntype picks from arguments"),
    (lambda g, x, **_: g.src(x) * g.etype, r"cannot compute with g.etype"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_refused_with_the_line_and_both_types(typed, number):
    function, message = REFUSED[number]
    layer = rgnn.layer(refused(function))
    tensors = {name: torch.zeros(shape) for name, shape in ARGUMENTS.items()}
    with pytest.raises(rgnn.LayerTypeError, match=message) as error:
        layer(typed, **tensors)
    assert str(error.value).startswith("test_language.py:") and "lambda g" in str(error.value)


def refused(function):
    def layer(g, x, W, K, r, e, U, s):
        return function(g, x=x, W=W, K=K, r=r, e=e, U=U, s=s)

    return layer


@rgnn.layer
def bilinear(g, x, K, r, e, U, s, norm):
    """In no paper: typed nodes, outer products, relation arithmetic, degrees, a learned scalar."""
    z = rgnn.tanh(rgnn.linear(x, K[g.ntype]))
    mode = rgnn.linear(r[g.etype], U) * norm  # computed once per relation
    left, right = rgnn.split(g.src(z) * mode + g.edge(e), (2, 3))
    pair = rgnn.reshape(rgnn.outer(left, right) * g.degree_norm(), 6)
    alpha = rgnn.edge_softmax(rgnn.dot(g.dst(z), mode) / (1.0 + g.src(g.out_degree())))
    return rgnn.concat(g.mean(pair), g.max(right) * s, g.sum(alpha * left))


def bilinear_plain(graph, x, K, r, e, U, s, norm):
    src, dst = graph.edge_index
    nodes = x.shape[0]
    z = torch.tanh(torch.einsum("ni,nio->no", x, K[graph.node_type.long()]))
    mode = ((r @ U) * norm)[graph.edge_type]
    left, right = (z[src] * mode + e).split((2, 3), dim=1)
    out_degree = torch.bincount(src, minlength=nodes).to(x.dtype)
    in_degree = torch.bincount(dst, minlength=nodes).to(x.dtype)
    pair = torch.einsum("ei,ej->eij", left, right).flatten(1)
    pair = pair / (out_degree[src] * in_degree[dst]).sqrt()[:, None]
    score = (z[dst] * mode).sum(1) / (1 + out_degree[src])
    rows = []
    for node in range(nodes):
        mine = dst == node
        if not mine.any():
            rows.append(x.new_zeros(11))
            continue
        alpha = torch.softmax(score[mine], 0)[:, None]
        best = right[mine].amax(0) * s
        rows.append(torch.cat([pair[mine].mean(0), best, (alpha * left[mine]).sum(0)]))
    return torch.stack(rows)


def bilinear_arguments():
    g = torch.Generator().manual_seed(1)
    shapes = ((9, 4), (2, 4, 5), (3, 4), (18, 5), (4, 5), (), (5,))
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    return [t.requires_grad_() for t in tensors]


def test_a_layer_in_no_paper_equals_its_formula(typed):
    args = bilinear_arguments()
    ours, plain = bilinear(typed, *args), bilinear_plain(typed, *args)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(plain)
    got, want = (torch.autograd.grad((y * weight).sum(), args) for y in (ours, plain))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.fixture
def one_thread():
    """Hundreds of calls on a tiny graph: waiting for a second thread is all they would do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_layer_in_no_paper_passes_gradcheck(typed):
    assert torch.autograd.gradcheck(lambda *a: bilinear(typed, *a), bilinear_arguments())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_in_no_paper_compiles(typed):
    args = bilinear_arguments()
    typed.prepare()

    def run(*args):
        return bilinear(typed.prepare(), *args)  # where it is there already, no lock is taken

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), bilinear(typed, *args))


@pytest.mark.parametrize("exponent", [1, 2, 5, 2.0, 0.5, -0.5, -1, -3])
def test_powers(typed, exponent):
    layer = rgnn.layer(lambda g, x: g.sum(g.src(x) ** exponent))
    x = (1 + torch.rand(9, 4, dtype=torch.float64)).requires_grad_()
    src, dst = typed.edge_index
    ours, plain = layer(typed, x), torch.zeros_like(x).index_add(0, dst, x[src] ** exponent)
    torch.testing.assert_close(ours, plain)
    (got,), (want,) = (torch.autograd.grad(y.sin().sum(), x) for y in (ours, plain))
    torch.testing.assert_close(got, want)


def test_symbols_are_told_apart_by_what_they_are():
    """A comparison is refused, so that containers must not need one."""
    x = Argument(Tracer({"x": (9, 4)}, RowCounts(9, 9, 18, 3, 2)), "x")
    assert {x: 1}[x] == 1 and not hasattr(x, "__array_interface__")


def test_a_parameter_used_first_stays_one(typed):
    layer = rgnn.layer(lambda g, s, x: g.sum(s * g.src(x)) * rgnn.exp(s))
    s, x = torch.tensor(0.3), torch.randn(9, 4)
    src, dst = typed.edge_index
    plain = torch.zeros_like(x).index_add(0, dst, s * x[src]) * s.exp()
    torch.testing.assert_close(layer(typed, s, x), plain)


def test_a_list_of_results_is_refused_and_told_what_may_be_returned(small):
    @rgnn.layer
    def listed(g, x):
        return [g.sum(g.src(x))]

    with pytest.raises(rgnn.LayerTypeError, match=r"listed returned \[.*\]; .* a tuple of values"):
        listed(small, torch.randn(20, 4))


def test_edges_are_returned_in_the_order_in_which_they_were_given():
    @rgnn.layer
    def both(g, x, e):
        return g.src(x), g.dst(x) * g.edge(e)

    edge_index = torch.tensor([[3, 0, 2, 2], [1, 3, 0, 1]])
    graph = rgnn.Graph(edge_index, torch.tensor([1, 0, 1, 0]), num_nodes=4)
    x, e = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2)
    src, scaled = both(graph, x, e)
    assert torch.equal(src, x[edge_index[0]]) and torch.equal(scaled, x[edge_index[1]] * e)
    weight = torch.randn(4, 2)
    (scaled * weight).sum().backward()
    expected = torch.zeros(4, 2).index_add(0, edge_index[1], e * weight)
    torch.testing.assert_close(x.grad, expected)


def test_rows_that_only_the_compiler_knows_are_not_returned(small):
    @rgnn.layer
    def pairs(g, x):
        return g.per_relation.sum(g.src(x))

    with pytest.raises(rgnn.LayerTypeError, match=r"pairs returned .*dst_pair\[4\].*: g.sum"):
        pairs(small, torch.randn(20, 4))


def test_a_method_is_refused_where_it_is_made():
    with pytest.raises(TypeError, match="layer forward is a method; write a function whose first"):
        rgnn.layer(torch.nn.ReLU.forward)
