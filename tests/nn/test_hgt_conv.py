import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff import nn, rgnn

pyg = pytest.importorskip("torch_geometric.nn")

METADATA = (
    ["author", "paper", "venue"],
    [
        ("author", "writes", "paper"),
        ("paper", "written_by", "author"),
        ("paper", "cites", "paper"),
        ("paper", "in", "venue"),
    ],
)  # nothing leads away from a venue


def problem(seed, counts, num_edges, widths, dtype):
    g = torch.Generator().manual_seed(seed)
    sizes = dict(zip(METADATA[0], counts, strict=True))
    x = {
        t: torch.randn(sizes[t], w, generator=g, dtype=dtype)
        for t, w in zip(METADATA[0], widths, strict=True)
    }
    edges = {}
    for (s, r, d), n in zip(METADATA[1], num_edges, strict=True):
        n = n if sizes[s] and sizes[d] else 0
        ends = [torch.randint(0, max(sizes[e], 1), (n,), generator=g) for e in (s, d)]
        edges[(s, r, d)] = torch.stack(ends)
    return x, edges


def pair(dtype, *args, **kwargs):
    theirs = pyg.HGTConv(*args, **kwargs).to(dtype)
    ours = nn.HGTConv(*args, **kwargs).to(dtype)
    with torch.no_grad():
        for k, p in enumerate(theirs.parameters()):
            g = torch.Generator().manual_seed(k)
            p.copy_(torch.randn(p.shape, generator=g, dtype=dtype) * 0.4)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(ours, theirs, x, edges, tolerance):
    """Forward, and every gradient."""
    xs = [{t: v.clone().requires_grad_() for t, v in x.items()} for _ in range(2)]
    a, b = ours(xs[0], edges), theirs(xs[1], edges)
    assert list(a) == list(b)
    weights = {t: torch.randn_like(v) for t, v in b.items()}
    for t in b:
        torch.testing.assert_close(a[t], b[t], rtol=tolerance, atol=tolerance, msg=t)
    for out in (a, b):
        sum((out[t] * weights[t]).sum() for t in b).backward()
    tensors = [(t, xs[0][t], xs[1][t]) for t in x]
    theirs_by_name = dict(theirs.named_parameters())
    tensors += [(n, p, theirs_by_name[n]) for n, p in ours.named_parameters()]
    for name, p, q in tensors:
        want = torch.zeros_like(q) if q.grad is None else q.grad
        have = torch.zeros_like(p) if p.grad is None else p.grad
        scale = max(1.0, float(want.abs().max()) if want.numel() else 0.0)
        torch.testing.assert_close(
            have, want, rtol=tolerance, atol=scale * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("widths", [(8, 8, 8), (5, 5, 5), (5, 8, 3)], ids=str)
def test_results_may_be_written_to(widths):
    in_channels = dict(zip(METADATA[0], widths, strict=True))
    ours, theirs = pair(torch.float64, in_channels, 8, METADATA, 2)
    x, edges = problem(0, (12, 20, 4), (40, 40, 60, 20), widths, torch.float64)
    found = []
    for conv in (ours, theirs):
        leaves = {t: v.clone().requires_grad_() for t, v in x.items()}
        out = conv(leaves, edges)
        out["paper"].mul_(3.0).relu_()
        out["venue"].zero_()
        loss = sum(v.square().sum() for v in out.values())
        parameters = [*leaves.values(), *(p for _, p in sorted(conv.named_parameters()))]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        found.append((out, grads))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("widths", [(8, 8, 8), (5, 8, 3)], ids=str)
def test_equals_pyg(heads, widths):
    in_channels = dict(zip(METADATA[0], widths, strict=True))
    ours, theirs = pair(torch.float64, in_channels, 8, METADATA, heads)
    x, edges = problem(0, (12, 20, 4), (40, 40, 60, 20), widths, torch.float64)
    compare(ours, theirs, x, edges, 1e-10)


@given(
    st.integers(0, 99),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.tuples(*[st.sampled_from([0, 1, 5, 30])] * 4),
    st.sampled_from([1, 3]),
)
@settings(max_examples=12, deadline=None)
def test_equals_pyg_on_any_graph(seed, counts, num_edges, heads):
    """Isolated nodes, relations without edges, no edges at all, repeated edges, loops, hubs."""
    x, edges = problem(seed, counts, num_edges, (4, 4, 4), torch.float64)
    ours, theirs = pair(torch.float64, 4, 6, METADATA, heads)
    compare(ours, theirs, x, edges, 1e-10)


def test_equals_pyg_with_500_relations():
    """Most of them have no edge, or a few."""
    types = METADATA[0]
    relations = [(types[r % 3], f"r{r}", types[r // 3 % 3]) for r in range(500)]
    g = torch.Generator().manual_seed(5)
    sizes = dict(zip(types, (12, 20, 4), strict=True))
    x = {t: torch.randn(n, 8, generator=g) for t, n in sizes.items()}
    edges = {
        (s, r, d): torch.stack(
            [torch.randint(0, sizes[end], (number % 3,), generator=g) for end in (s, d)]
        )
        for number, (s, r, d) in enumerate(relations)
    }
    compare(*pair(torch.float32, 8, 8, (types, relations), 2), x, edges, 1e-5)


def test_equals_pyg_in_float32():
    x, edges = problem(1, (12, 20, 4), (40, 40, 60, 20), (16, 16, 16), torch.float32)
    compare(*pair(torch.float32, 16, 16, METADATA, 2), x, edges, 1e-5)


def test_a_state_from_before_the_first_run_is_loaded():
    """PyG's has biases already, of no value, which it makes anew together with the weights."""
    x, edges = problem(3, (5, 4, 3), (6, 5, 4, 3), (7, 6, 5), torch.float64)
    ours, theirs = (kind(-1, 8, METADATA, heads=2).double() for kind in (nn.HGTConv, pyg.HGTConv))
    ours.load_state_dict(theirs.state_dict())
    ours(x, edges), theirs(x, edges)
    for lin, width in zip(ours.kqv_lin.lins.values(), (7, 6, 5), strict=True):
        assert (lin.weight.shape, lin.bias.shape) == ((24, width), (24,))
        assert max(lin.weight.abs().max(), lin.bias.abs().max()) <= width**-0.5
    theirs.load_state_dict(ours.state_dict())
    compare(ours, theirs, x, edges, 1e-10)


def test_a_trained_state_is_loaded_before_the_first_run():
    x, edges = problem(1, (5, 4, 3), (6, 5, 4, 3), (7, 6, 5), torch.float64)
    trained, fresh = (nn.HGTConv(-1, 8, METADATA, heads=2).double() for _ in range(2))
    want = trained(x, edges)
    fresh.load_state_dict(trained.state_dict())
    wrong = {name: rows[:, 1:] for name, rows in x.items()}
    with pytest.raises(ValueError, match=r"x of '.*' has shape .* the layer takes 7 features"):
        fresh(wrong, edges)
    found = fresh(x, edges)
    assert found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)
    assert [lin.in_features for lin in fresh.kqv_lin.lins.values()] == [7, 6, 5]


def test_width_from_the_first_input():
    x, edges = problem(1, (12, 20, 4), (40, 40, 60, 20), (5, 6, 7), torch.float32)
    ours, theirs = nn.HGTConv(-1, 8, METADATA), pyg.HGTConv(-1, 8, METADATA)
    theirs(x, edges)
    ours(x, edges)
    ours.load_state_dict(theirs.state_dict())
    compare(ours, theirs, x, edges, 1e-5)


def test_order_of_the_edge_dictionary_does_not_matter():
    """PyG assumes the metadata's order within `k_rel` and `v_rel`, and does not check it."""
    x, edges = problem(2, (12, 20, 4), (40, 40, 60, 20), (8, 8, 8), torch.float64)
    ours, theirs = pair(torch.float64, 8, 8, METADATA, 2)
    turned = dict(reversed(edges.items()))
    for t, rows in ours(x, turned).items():
        torch.testing.assert_close(rows, theirs(x, edges)[t], rtol=1e-10, atol=1e-10)


def test_sparse_adjacency_and_prepared_graph():
    x, edges = problem(3, (12, 20, 4), (40, 40, 60, 20), (8, 8, 8), torch.float32)
    edges = {k: torch.unique(v, dim=1) for k, v in edges.items()}
    conv = nn.HGTConv(8, 8, METADATA, heads=2)
    want = conv(x, edges)
    sizes = {t: v.shape[0] for t, v in x.items()}
    graph = rgnn.Graph.from_typed(edges, sizes, edge_types=METADATA[1])
    with torch.sparse.check_sparse_tensor_invariants():  # torch 2.11 warns unless it is told
        sparse = {
            (s, r, d): torch.sparse_coo_tensor(
                v.flip(0), torch.ones(v.shape[1]), (sizes[d], sizes[s])
            )
            for (s, r, d), v in edges.items()
        }
    for given_edges in (graph, sparse):
        for t, rows in conv(x, given_edges).items():
            torch.testing.assert_close(rows, want[t])


def test_block_whose_destinations_come_first():
    x, edges = problem(4, (12, 20, 4), (40, 40, 60, 20), (8, 8, 8), torch.float64)
    inner = {"author": 5, "paper": 7, "venue": 4}
    edges = {k: v[:, v[1] < inner[k[2]]] for k, v in edges.items()}
    conv = nn.HGTConv(8, 8, METADATA, heads=2).double()
    sizes = {t: v.shape[0] for t, v in x.items()}
    block = rgnn.Graph.from_typed(edges, sizes, num_dst_nodes=inner, edge_types=METADATA[1])
    whole = conv(x, edges)
    for t, rows in conv(x, block).items():
        torch.testing.assert_close(rows, whole[t][: inner[t]], rtol=1e-10, atol=1e-10)


# Dynamo makes an instance of the autograd function while it traces it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break():
    x, edges = problem(1, (12, 20, 4), (40, 40, 60, 20), (8, 8, 8), torch.float32)
    sizes = {t: v.shape[0] for t, v in x.items()}
    graph = rgnn.Graph.from_typed(edges, sizes, edge_types=METADATA[1]).prepare()
    conv = nn.HGTConv(8, 8, METADATA, heads=2)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for t, rows in compiled(x, graph).items():
        torch.testing.assert_close(rows, conv(x, graph)[t])


def test_half_precision_keeps_its_dtype():
    x, edges = problem(1, (12, 20, 4), (40, 40, 60, 20), (8, 8, 8), torch.float32)
    conv = nn.HGTConv(8, 8, METADATA, heads=2)
    exact = conv(x, edges)
    half = conv.bfloat16()({t: v.bfloat16() for t, v in x.items()}, edges)
    for t, rows in half.items():
        assert rows.dtype == torch.bfloat16
        torch.testing.assert_close(rows.float(), exact[t], rtol=0.05, atol=0.05)


def test_refusals():
    with pytest.raises(ValueError, match="3 heads do not divide 8"):
        nn.HGTConv(4, 8, METADATA, heads=3)
    with pytest.raises(NotImplementedError, match="flow"):
        nn.HGTConv(4, 8, METADATA, flow="target_to_source")
    conv = nn.HGTConv(4, 8, METADATA)
    x, edges = problem(0, (3, 3, 3), (5, 5, 5, 5), (4, 4, 4), torch.float32)
    with pytest.raises(KeyError, match="reads"):
        conv(x, {("author", "reads", "paper"): edges["author", "writes", "paper"]})
    with pytest.raises(KeyError, match="editor"):
        conv({**x, "editor": x["paper"]}, edges)
    with pytest.raises(TypeError, match="edge_index_dict is a dictionary by type, got a tensor"):
        conv(x, edges["author", "writes", "paper"])
    with pytest.raises(TypeError, match=r"edges of .* must be a tensor, got list"):
        conv(x, {("author", "writes", "paper"): [[0], [1]]})
    wrong = {("author", "writes", "paper"): torch.tensor([[0], [9]])}
    with pytest.raises(IndexError, match=r"destination 9 .* 3 'paper' nodes"):
        conv(x, wrong)
    with pytest.raises(ValueError, match="edge types"):
        conv(x, rgnn.Graph(torch.zeros(2, 0, dtype=torch.long), num_nodes=9))
