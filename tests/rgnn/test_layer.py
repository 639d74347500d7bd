import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from rgnn_layers import gated, graphs, rgat, rgat_dense, rgcn, rgcn_loop, rgcn_mean, rgcn_mean_dense

from dataeff import rgnn
from dataeff.rgnn import plan


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def arguments(layer, nodes, relations, width=3, out=4):
    x, W = leaf(nodes, width), leaf(relations, width, out)
    return {
        rgcn: (x, W),
        rgcn_mean: (x, W, leaf(width, out), leaf(out)),
        rgat: (x, W, leaf(relations, out), leaf(relations, out)),
    }[layer]


@pytest.mark.parametrize(
    ("layer", "plain"),
    [(rgcn, rgcn_loop), (rgcn_mean, rgcn_mean_dense), (rgat, rgat_dense)],
    ids=["rgcn", "rgcn_mean", "rgat"],
)
@given(graphs())
@settings(max_examples=15, deadline=None)
def test_layer_equals_its_formula(layer, plain, case):
    edge_index, etype, nodes, relations = case
    args = arguments(layer, nodes, relations)
    g = rgnn.Graph(edge_index, etype, num_nodes=nodes)
    ours, theirs = layer(g, *args), plain(edge_index, etype, *args)
    if layer is rgcn:
        theirs = theirs[:nodes]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(theirs)
    got = torch.autograd.grad((ours * weight).sum(), args)
    if not theirs.requires_grad:
        assert all((a == 0).all() for a in got)
        return
    want = torch.autograd.grad((theirs * weight).sum(), args, allow_unused=True)
    for a, b, t in zip(got, want, args, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(t) if b is None else b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", [rgcn, rgcn_mean, rgat], ids=lambda f: f.name)
def test_gradcheck(layer, small):
    args = arguments(layer, 20, 4)
    assert torch.autograd.gradcheck(lambda *a: layer(small, *a), args)


def test_gradcheck_of_a_layer_in_no_paper(small):
    args = (leaf(20, 3), leaf(4, 3, 4), leaf(3, 4), leaf(4), leaf(60))
    assert torch.autograd.gradcheck(lambda *a: gated(small, *a), args)
    assert gated(small, *args).shape == (20, 8)


def test_only_wanted_gradients_are_computed(small):
    x, W, a, b = (t.detach() for t in arguments(rgat, 20, 4))
    W.requires_grad_()
    rgat(small, x, W, a, b).sum().backward()
    assert W.grad is not None and x.grad is None


def test_double_backward_is_refused(small):
    x, W = leaf(20, 3), leaf(4, 3, 4)
    (dx,) = torch.autograd.grad(rgcn(small, x, W).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.add_(1.0)], ids=["relu_", "add_"])
def test_a_result_may_be_written_to_where_backward_does_not_read_it(small, change):
    args = arguments(rgcn_mean, 20, 4)
    want = torch.autograd.grad(change(rgcn_mean(small, *args).clone()).sin().sum(), args)
    got = torch.autograd.grad(change(rgcn_mean(small, *args)).sin().sum(), args)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_a_result_that_backward_reads_may_not_be_written_to(small):
    args = arguments(rgat, 20, 4)
    assert rgat.plan(small, *args).compiled.reads_outputs == 1
    y = rgat(small, *args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.mul_(2.0).sum(), args)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_of_several_results_any_may_be_left_unused(small, compiled):
    @rgnn.layer
    def several(g, x, W):
        z = rgnn.linear(g.src(x), W[g.etype])
        alpha = rgnn.edge_softmax(rgnn.dot(z, z))
        return g.sum(alpha * z), rgnn.sigmoid(g.mean(z)), alpha

    args = arguments(rgcn, 20, 4)
    call = lambda *a: several(small, *a)  # noqa: E731
    if compiled:
        small.prepare()
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    for k in range(3):
        got = torch.autograd.grad(call(*args)[k].sin().sum(), args)
        results = several(small, *args)
        total = sum(y.sin().sum() * (position == k) for position, y in enumerate(results))
        for a, b in zip(got, torch.autograd.grad(total, args), strict=True):
            torch.testing.assert_close(a, b)


def test_a_layer_may_have_more_results_than_bits_tell_of(small, monkeypatch):
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "reference")

    @rgnn.layer
    def many(g, x):
        return tuple(g.max(g.src(x) * float(k)) for k in range(70))

    @rgnn.layer
    def one(g, x):
        return g.max(g.src(x))

    x = leaf(20, 3)
    results = many(small, x)
    wanted = [one(small, x * k) for k in range(70)]
    for a, b in zip(results, wanted, strict=True):
        torch.testing.assert_close(a, b)
    (got,) = torch.autograd.grad(sum(y.sin().sum() for y in results[1:]), x)
    (want,) = torch.autograd.grad(sum(y.sin().sum() for y in wanted[1:]), x)
    torch.testing.assert_close(got, want)


def test_large_scores_survive_the_softmax(small):
    x, W, a, b = arguments(rgat, 20, 4)
    y = rgat(small, x, W, a * 1e4, b * 1e4)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


def test_a_graph_of_one_call_lives_until_backward():
    x, W = leaf(5, 3), leaf(1, 3, 4)
    loss = rgcn(rgnn.Graph(torch.tensor([[0, 1], [2, 2]]), num_nodes=5), x, W).sum()
    gc.collect()
    loss.backward()
    assert x.grad[:2].any() and not x.grad[2:].any()


def test_block_with_destinations_first():
    src, dst = torch.tensor([3, 4, 0, 2]), torch.tensor([0, 1, 1, 0])
    etype = torch.tensor([0, 1, 0, 1])
    block = rgnn.Graph(torch.stack([src, dst]), etype, num_src_nodes=5, num_dst_nodes=2)
    whole = rgnn.Graph(torch.stack([src, dst]), etype, num_nodes=5)
    args = arguments(rgat, 5, 2)
    y = rgat(block, *args)
    assert y.shape == (2, 4)
    torch.testing.assert_close(y, rgat(whole, *args)[:2])
    assert torch.autograd.gradcheck(lambda *a: rgat(block, *a), args)
    root = arguments(rgcn_mean, 5, 2)
    torch.testing.assert_close(rgcn_mean(block, *root), rgcn_mean(whole, *root)[:2])


def test_more_relations_in_the_weights_than_in_the_graph(small):
    x, W, a, b = arguments(rgat, 20, 9)
    torch.testing.assert_close(rgat(small, x, W, a, b), rgat(small, x, W[:4], a[:4], b[:4]))


@rgnn.layer
def scaled(g, x, factor, how=None):
    return g.sum(g.src(x)) * factor


def test_a_layer_called_by_a_layer_is_a_part_of_it(small):
    @rgnn.layer
    def message(g, z, factor=1.0):
        return g.src(z) * factor

    @rgnn.layer
    def outer(g, x, W):
        return g.sum(rgnn.linear(message(g, x, factor=2.0) + message(g, x), W[g.etype]))

    @rgnn.layer
    def at_once(g, x, W):
        return g.sum(rgnn.linear(g.src(x) * 2.0 + g.src(x), W[g.etype]))

    x, W = leaf(20, 3), leaf(4, 3, 4)
    got, expected = outer(small, x, W), at_once(small, x, W)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), (x, W)),
        torch.autograd.grad(expected.square().sum(), (x, W)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("number", [np.float32(1.5), np.int64(2)])
def test_numbers_of_numpy_are_numbers(small, number):
    x = leaf(20, 3)
    layer = rgnn.layer(lambda g, x: g.sum(g.src(x) * number))
    plainly = rgnn.layer(lambda g, x: g.sum(g.src(x) * number.item()))
    assert torch.equal(layer(small, x), plainly(small, x))


@pytest.mark.parametrize("factor", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)], ids=repr)
def test_numbers_are_constants(small, factor):
    x = torch.randn(20, 3)
    assert torch.equal(scaled(small, x, factor), 2 * scaled(small, x, 1))


@pytest.mark.parametrize(
    "value",
    [float("inf"), torch.float32, len, object(), np.ones(2)],
    ids=lambda v: type(v).__name__,
)
def test_what_is_neither_tensor_nor_constant_is_named(small, value):
    with pytest.raises(
        TypeError, match=r"scaled: argument how is .* is None, text, a finite number"
    ):
        scaled(small, torch.randn(20, 3), 1.0, how=value)


def test_what_is_no_number_is_not_hidden(small):
    @rgnn.layer
    def parts(g, x):
        return g.max(g.src(x)), g.sum(rgnn.relu(g.src(x)))

    x = torch.randn(20, 3)
    src, dst = small.edge_index
    x[src[0]] = float("nan")
    for value in parts(small, x):
        assert value[dst[0]].isnan().all() and value.isfinite().any()


def test_same_bits_every_time(small):
    args = arguments(rgat, 20, 4)
    runs = [torch.autograd.grad(rgat(small, *args).sum(), args) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


class TestRefusals:
    def test_wrong_domain_names_the_line_and_both_types(self, small):
        @rgnn.layer
        def bad(g, x):
            return g.src(x) + g.sum(g.src(x))

        with pytest.raises(rgnn.LayerTypeError, match=r"test_layer.py:\d+: return g.src") as error:
            bad(small, torch.randn(20, 3))
        assert "dst[3]" in str(error.value) and "an edge value" in str(error.value)

    def test_wrong_shape_names_both(self, small):
        with pytest.raises(rgnn.LayerTypeError, match=r"edge\[7\].*etype\[3x4\]"):
            rgcn(small, torch.randn(20, 7), torch.randn(4, 3, 4))

    def test_wrong_rows(self, small):
        with pytest.raises(ValueError, match=r"shape \[19, 3\].* needs 20 rows"):
            rgcn(small, torch.randn(19, 3), torch.randn(4, 3, 4))
        with pytest.raises(ValueError, match="at least 4 rows"):
            rgcn(small, torch.randn(20, 3), torch.randn(3, 3, 4))

    def test_dtypes(self, small):
        with pytest.raises(TypeError, match=r"W is torch.float64, but x is torch.float32"):
            rgcn(small, torch.randn(20, 3), torch.randn(4, 3, 4).double())
        with pytest.raises(TypeError, match="int64"):
            rgcn(small, torch.zeros(20, 3, dtype=torch.long), torch.randn(4, 3, 4))

    def test_arguments(self, small):
        with pytest.raises(TypeError, match="misses argument 'W'"):
            rgcn(small, torch.randn(20, 3))
        with pytest.raises(TypeError, match="unexpected"):
            rgcn(small, torch.randn(20, 3), V=torch.randn(1))

    def test_used_in_two_domains(self, small):
        @rgnn.layer
        def twice(g, x):
            return g.sum(g.src(x) * g.edge(x))

        with pytest.raises(rgnn.LayerTypeError, match=r"used as an edge.* but as a node"):
            twice(small, torch.randn(20))


# Dynamo makes an instance of the autograd function while it traces it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break(small):
    args = arguments(rgat, 20, 4)
    small.prepare()
    compiled = torch.compile(lambda *a: rgat(small, *a) * 2, fullgraph=True, backend="aot_eager")
    y = compiled(*args)
    torch.testing.assert_close(y, rgat(small, *args) * 2)
    got = torch.autograd.grad(y.sum(), args)
    want = torch.autograd.grad((rgat(small, *args) * 2).sum(), args)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_operators_pass_opcheck(small):
    x, W, a, b = (t.detach() for t in arguments(rgat, 20, 4))
    sizes = list(small.sizes)
    spec = repr((("x", "W", "a_src", "a_dst"), ()))
    forward = ([x, W, a, b], small.token, rgat.id, spec, sizes, 15)
    torch.library.opcheck(torch.ops.dataeff.rgnn_forward.default, forward)
    outputs, saved = torch.ops.dataeff.rgnn_forward(*forward)
    grads = [torch.randn_like(outputs[0])]
    torch.library.opcheck(
        torch.ops.dataeff.rgnn_backward.default,
        (grads, [x, W, a, b], outputs, saved, *forward[1:]),
    )


def test_explain_shows_the_programs(small):
    text = rgat.explain(small, *arguments(rgat, 20, 4))
    assert "== traced ==" in text and "== backward ==" in text and "logsum[edge.dst]" in text
    assert "== forward kernels ==" in text and "traversal over dst" in text and "Mflop" in text
    assert "dataeff::parallel_for" in text


def test_an_argument_that_does_not_matter_has_no_gradient_but_zero(small):
    @rgnn.layer
    def ignores(g, x, unused):
        _ = g.src(unused) * 2.0
        return g.sum(g.src(x))

    x, unused = leaf(20, 3), leaf(20, 3)
    ignores(small, x, unused).sum().backward()
    assert x.grad.any() and not unused.grad.any()


def test_a_layer_goes_with_its_model_but_not_before_its_backward(small):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 3, 4))

            @rgnn.layer
            def scaled(g, x, W, factor=2.0):
                return g.sum(rgnn.linear(g.src(x), W[g.etype]) * (factor * self.factor))

            self.factor, self.scaled = 3.0, scaled

    model, x = Scaled(), torch.randn(20, 3)
    known, weight = weakref.ref(model), model.weight
    result = model.scaled(small, x, weight)
    expected = 6 * rgcn(small, x, weight)
    del model
    gc.collect()
    plan._plan_for.cache_clear()
    got, want = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (result, expected))
    torch.testing.assert_close(got, want)
    del result
    gc.collect()
    assert known() is None


def test_a_call_of_a_layer_that_is_gone_is_named(small):
    @rgnn.layer
    def gone(g, x):
        return g.sum(g.src(x))

    x, spec = torch.randn(20, 3), plan.spec_of(("x",), ())
    request = plan.Request.of(gone.id, spec, [x], list(small.sizes), 0)
    plan.plan_for(request)
    plan._plan_for.cache_clear()
    del gone
    gc.collect()
    with pytest.raises(RuntimeError, match="layer of this call is gone"):
        plan.plan_for(request)


def test_a_layer_is_named_when_printed_and_a_large_constant_is_cut_short(small):
    assert repr(rgcn) == "rgnn.layer rgcn(x, W)"
    with pytest.raises(TypeError, match=r"argument x is array\(.*ndarray") as caught:
        rgcn(small, np.ones((200, 3)), torch.ones(4, 3, 4))
    assert len(str(caught.value)) < 250
