"""Generated kernels against the interpreter of the IR: the same programs, the same values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rgnn_layers import (
    STATICS,
    gated,
    graphs,
    heads,
    rgat,
    rgcn,
    rgcn_loop,
    rgcn_mean,
    tensors,
    typed_graph,
)

from dataeff import rgnn
from dataeff.nn.comp_gcn_conv import comp_gcn
from dataeff.nn.hgt_conv import hgt
from dataeff.nn.simple_hgn_conv import simple_hgn
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.interpret import interpret
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.view import View

LAYERS = [rgcn, rgcn_mean, rgat, gated, heads, hgt, simple_hgn, comp_gcn]


def check(backend, monkeypatch, layer, case, dtype, tolerance, choice=None, **sizes):
    """Run forward and backward programs on a backend and on the interpreter."""
    _, etype, nodes, relations = case
    graph = typed_graph(case)
    named = tensors(layer, nodes, etype.numel(), relations, dtype, **sizes)
    plan = layer.plan(graph, **named, **STATICS.get(layer, {}))
    view = View(graph, plan.sizes)
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", backend)
    values = compare(plan.compiled.forward, view, named, dtype, tolerance, choice)
    outputs, saved = values[: plan.compiled.num_outputs], values[plan.compiled.num_outputs :]
    named |= {f"grad:{k}": torch.randn_like(v) for k, v in enumerate(outputs)}
    named |= {f"output:{k}": v for k, v in enumerate(outputs)}
    named |= {f"saved:{k}": v for k, v in enumerate(saved)}
    compare(plan.compiled.backward, view, named, dtype, 10 * tolerance, choice)


def compare(program, view, named, dtype, tolerance, choice=None):
    want = interpret(program, view, named)
    got = Runner(program, dtype, "cpu", choice=choice)(view, named)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return want


CASE = (
    torch.randint(0, 9, (2, 30), generator=torch.Generator().manual_seed(5)),
    torch.arange(30) % 3,
    11,
    4,
)
HUB = (
    torch.stack([torch.arange(100) % 7, torch.zeros(100, dtype=torch.long)]),
    torch.arange(100) % 2,
    8,
    2,
)
NO_EDGES = (torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 3, 2)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.name)
@pytest.mark.parametrize("case", [CASE, HUB, NO_EDGES], ids=["random", "hub", "no edges"])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_backend_equals_the_interpreter(backend, layer, case, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    check(backend, monkeypatch, layer, case, torch.float32, 2e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.name)
@given(case=graphs())
@settings(max_examples=15, deadline=None)
def test_cpp_in_float64_on_any_graph(layer, case):
    with pytest.MonkeyPatch.context() as patch:
        check("cpp", patch, layer, case, torch.float64, 1e-10)


@pytest.mark.parametrize("width", [33, 64])
def test_wide_rows(width, monkeypatch):
    for backend in ("cpp", "triton"):
        check(backend, monkeypatch, rgat, CASE, torch.float64, 1e-10, width=width, out=width)


def test_no_compiler_falls_back_with_one_warning(monkeypatch, small):
    from dataeff.rgnn import backend
    from dataeff.rgnn.cpp import backend as cpp_backend
    from dataeff.rgnn.cpp.toolchain import CompilerMissing

    def missing(source, **kwargs):
        raise CompilerMissing("no C++ compiler: install one")

    monkeypatch.setattr(cpp_backend, "compile_cpp", missing)
    backend._warn_once.cache_clear()
    args = [torch.randn(20, 7), torch.randn(4, 7, 7), torch.randn(4, 7), torch.randn(4, 7)]
    with pytest.warns(RuntimeWarning, match="install one") as record:
        fallback = rgat(small, *args)
    assert len(record) == 1
    torch.testing.assert_close(fallback[:0], fallback.new_empty(0, 7))
    plan = rgat.plan(small, *args)
    view = View(small, plan.sizes)
    named = dict(zip(plan.request.names, args, strict=True))
    torch.testing.assert_close(fallback, interpret(plan.compiled.forward, view, named)[0])


def test_unknown_backend_is_refused(monkeypatch):
    from dataeff.rgnn.backend import choose

    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of"):
        choose("cpu")


def test_rows_found_through_an_index_are_fetched_ahead(small):
    """And so are the indices that lead to other indices; nothing beyond the index is read."""
    x, W = torch.randn(20, 32, dtype=torch.float64), torch.randn(4, 32, 64, dtype=torch.float64)
    compiled = rgcn.plan(small, x, W).compiled
    assert "prefetch<64>(v" in compiled.forward_runner.sources()
    backward = compiled.backward_runner.sources()
    assert backward.index("t + 2 * kAhead") < backward.index("prefetch<1>(index_edge_dst")
    expected = rgcn_loop(small.edge_index, small.edge_type, x, W)
    torch.testing.assert_close(rgcn(small, x, W), expected)


def test_backward_overwrites_only_values_of_its_own(small):
    """The gradient of a gradient input, a saved value and the arguments stay as they are."""
    x, W, a, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((20, 16), (4, 16, 16), (4, 16), (4, 16))
    )
    y = rgat(small, x, W, a, b)
    dy = torch.randn_like(y)
    before = [t.detach().clone() for t in (x, W, a, b, y, dy)]
    first = torch.autograd.grad(y, (x, W, a, b), dy, retain_graph=True)
    again = torch.autograd.grad(y, (x, W, a, b), dy)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
    for was, tensor in zip(before, (x, W, a, b, y, dy), strict=True):
        assert torch.equal(was, tensor.detach())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.name)
def test_long_rows_have_a_kernel_of_their_own(layer, monkeypatch):
    """Hubs on both sides of the bound, and one row exactly at it."""
    pytest.importorskip("triton")
    dst = torch.tensor([0] * 40 + [1] * 8 + [2] * 9 + [4] * 3)
    g = torch.Generator().manual_seed(2)
    edges = torch.stack([torch.randint(0, 3, (60,), generator=g), dst])
    case = (edges, torch.arange(60) % 2, 6, 2)
    check("triton", monkeypatch, layer, case, torch.float32, 2e-5, choice=Choice(long_row=8))


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.name)
def test_a_few_programs_share_the_long_rows_out(layer, programs, monkeypatch):
    """One takes rows of other lengths one after another, some times a block and less than one."""
    pytest.importorskip("triton")
    monkeypatch.setattr("dataeff.rgnn.triton.backend.MOST_PROGRAMS", programs)
    dst = torch.repeat_interleave(torch.arange(7), torch.tensor([20, 3, 9, 0, 2, 7, 19]))
    case = (torch.stack([dst.flip(0), dst]), torch.arange(60) % 2, 8, 2)
    choice = Choice(long_row=2, block_elements=32)
    check("triton", monkeypatch, layer, case, torch.float32, 2e-5, choice=choice)


@given(case=graphs(), bound=st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_long_rows_are_listed_once(case, bound):
    edge_index, etype, nodes, relations = case
    graph = rgnn.Graph(edge_index, etype, num_nodes=nodes, num_relations=relations)
    degree = torch.bincount(edge_index[1], minlength=nodes)
    listed = graph.structure.long_rows("edge.dst", bound, etype.numel())
    if listed is None:
        assert degree.max() <= bound
        return
    rows = listed.rows
    assert rows.numel() <= etype.numel() // (bound + 1)
    assert rows.dtype == listed.count.dtype == torch.int32
    found = rows[: listed.count]
    assert found.tolist() == (degree > bound).nonzero().squeeze(1).tolist()
    assert (rows[found.numel() :] == -1).all()


@rgnn.layer
def kinks(g, x):
    return g.max(g.src(x)), rgnn.relu(g.sum(g.src(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_what_is_no_number_stays_so_as_in_torch(backend, dtype, small, monkeypatch):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", backend)
    x = torch.randn(20, 3, dtype=dtype)
    x[small.edge_index[0, 0]] = torch.nan
    x[small.edge_index[0, 1], 1] = torch.inf
    program = kinks.plan(small, x).compiled.forward
    view, named = View(small, kinks.plan(small, x).sizes), {"x": x}
    got, want = Runner(program, dtype, "cpu")(view, named), interpret(program, view, named)
    for a, b in zip(got, want, strict=True):
        assert b.isnan().any() and b.isfinite().any()
        torch.testing.assert_close(a, b, equal_nan=True)
