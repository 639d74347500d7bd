"""Layers inside PyTorch: compiled, autocast, transformed by torch.func, copied, exported."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from rgnn_layers import rgat, rgcn, rgcn_mean
from torch.autograd import forward_ad

from dataeff import rgnn
from dataeff.nn import RGATConv, RGCNConv

# Dynamo makes an instance of the autograd function while it traces it.
dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def weights(relations=4, width=8, dtype=torch.float32):
    W = leaf(relations, width, width, dtype=dtype)
    return W, leaf(relations, width, dtype=dtype), leaf(relations, width, dtype=dtype)


def block(num_nodes, num_edges, seed=0):
    g = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(0, num_nodes, (2, num_edges), generator=g)
    edge_type = torch.randint(0, 4, (num_edges,), generator=g)
    return rgnn.Graph(edge_index, edge_type, num_nodes=num_nodes, num_relations=4).prepare()


@dynamo
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inductor's own
def test_inductor_runs_the_layer_without_a_graph_break(small):
    args = (leaf(20, 8), *weights())
    small.prepare()

    def model(*a):
        return torch.relu(rgat(small, *a)) * 2

    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True)(*args)
    torch.testing.assert_close(y, model(*args))
    got = torch.autograd.grad(y.sum(), args)
    for a, b in zip(got, torch.autograd.grad(model(*args).sum(), args), strict=True):
        torch.testing.assert_close(a, b)


@dynamo
def test_sampled_blocks_of_about_one_size_share_a_compiled_program():
    made = []

    def backend(module, example_inputs):
        made.append(module)
        return module.forward

    def model(graph, x, *parameters):
        return x + torch.relu(rgat(graph, x, *parameters))

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    parameters = weights()
    for seed in range(12):
        num_nodes = 100 + 3 * seed
        graph, x = block(num_nodes, 380 + 5 * seed, seed), leaf(num_nodes, 8)
        y = compiled(graph, x, *parameters)
        torch.testing.assert_close(y, model(graph, x, *parameters))
        got = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(got, torch.autograd.grad(model(graph, x, *parameters).sum(), x))
    assert len(made) <= 2  # the first sizes as numbers, then symbols for all that follow


@dynamo
def test_gradients_survive_aot_autograd_with_symbolic_sizes():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda graph, *a: rgat(graph, *a).square(), fullgraph=True, backend="aot_eager"
    )
    parameters = weights()
    for seed in range(3):
        graph, x = block(90 + seed, 300 + seed, seed), leaf(90 + seed, 8)
        want = torch.autograd.grad(rgat(graph, x, *parameters).square().sum(), (x, *parameters))
        got = torch.autograd.grad(compiled(graph, x, *parameters).sum(), (x, *parameters))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@dynamo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_dropped_graph_lives_until_backward_and_no_longer(backend):
    torch._dynamo.reset()
    layer = torch.compile(lambda g, *a: rgcn(g, *a).relu(), fullgraph=True, backend=backend)
    x, W = leaf(50, 8), leaf(4, 8, 8)
    for run in (layer, rgcn):
        graph = block(50, 200)
        alive = weakref.ref(graph)
        y = run(graph, x, W)
        del graph
        y.sum().backward()
        del y
        gc.collect()
        assert alive() is None


def test_a_graph_not_prepared_is_refused_in_a_compiled_region(monkeypatch, small):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"graph.prepare\(\)"):
        rgcn(small, leaf(20, 8), leaf(4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_arguments_and_sums_in_float32(dtype, small):
    args = (leaf(20, 8), *weights())
    with torch.autocast("cpu", dtype=dtype):
        y = rgat(small, *args)
        assert y.dtype == dtype
        y.sum().backward()
    assert all(a.grad.dtype == torch.float32 for a in args)
    rounded = [a.detach().to(dtype).requires_grad_() for a in args]
    outside = rgat(small, *rounded)
    assert torch.equal(y, outside)
    outside.sum().backward()
    for a, b in zip(args, rounded, strict=True):
        assert torch.equal(a.grad, b.grad.float())
    exact = rgat(small, *(a.detach().to(dtype).double() for a in args))
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone_and_mixes_narrower_dtypes(small):
    x, W = leaf(20, 8), leaf(4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rgcn(small, x.double(), W.double()).dtype == torch.float64
        assert rgcn(small, x.bfloat16(), W).dtype == torch.bfloat16


class TestFunc:
    def test_grad_and_functional_call(self, small):
        conv, x = RGATConv(8, 8, num_relations=4, heads=2, concat=False).double(), leaf(20, 8)
        x = x.detach().double()
        parameters = {k: v.detach() for k, v in conv.named_parameters()}

        def loss(p):
            return torch.func.functional_call(conv, p, (x, small)).square().sum()

        got = torch.func.grad(loss)(parameters)
        conv(x, small).square().sum().backward()
        for name, parameter in conv.named_parameters():
            want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(got[name], want)

    def test_vmap_over_weights_equals_a_loop(self, small):
        x, W = torch.randn(20, 8), torch.randn(3, 4, 8, 8)
        got = torch.func.vmap(lambda w: rgcn(small, x, w))(W)
        torch.testing.assert_close(got, torch.stack([rgcn(small, x, w) for w in W]))

    def test_gradients_per_sample(self, small):
        W, xs = torch.randn(4, 8, 8), torch.randn(3, 20, 8)

        def loss(w, x):
            return rgcn(small, x, w).square().sum()

        got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(W, xs)
        torch.testing.assert_close(got, torch.stack([torch.func.grad(loss)(W, x) for x in xs]))

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch itself
    def test_forward_mode_is_refused_and_not_zero(self, small):
        x, W = torch.randn(20, 8), torch.randn(4, 8, 8)

        def f(x):
            return rgcn(small, x, W)

        with pytest.raises(
            NotImplementedError, match=r"no forward-mode derivative: use torch.func"
        ):
            torch.func.jvp(f, (x,), (torch.ones_like(x),))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jacfwd(f)(x)
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                f(forward_ad.make_dual(x, torch.ones_like(x)))
            assert torch.equal(f(x), f(x.clone()))  # what carries no tangent goes through
        got = torch.func.jacrev(lambda x: f(x).sum(0))(x)
        assert got.shape == (8, 20, 8) and got.any()

    def test_a_gradient_of_a_gradient_is_refused(self, small):
        x, W = torch.randn(20, 8), torch.randn(4, 8, 8)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.func.grad(
                lambda w: torch.func.grad(lambda v: rgcn(small, x, v).square().sum())(w).sum()
            )(W)


class TestInferenceMode:
    """Validation often comes first, and leaves behind what training finds again."""

    def test_edges_seen_in_validation_are_trained_on(self, small):
        conv, x = RGATConv(8, 8, num_relations=4), leaf(20, 8)
        edges = small.edge_index.clone(), small.edge_type.clone()
        with torch.inference_mode():
            before = conv(x, *edges)
        y = conv(x, *edges)
        assert torch.equal(y, before)
        y.sum().backward()
        assert x.grad.any() and conv.weight.grad.any()

    def test_a_graph_made_in_validation_is_trained_on(self, small):
        with torch.inference_mode():
            graph = rgnn.Graph(small.edge_index, small.edge_type, num_nodes=20).prepare()
        x, W = leaf(20, 8), leaf(4, 8, 8)
        rgcn(graph, x, W).sum().backward()
        assert x.grad.any() and W.grad.any()


class TestCopies:
    def test_modules_deepcopy_and_pickle(self, small):
        conv, x = RGATConv(8, 8, num_relations=4), torch.randn(20, 8)
        for other in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
            assert torch.equal(other(x, small), conv(x, small))
            other.weight.data.zero_()
            assert not torch.equal(other(x, small), conv(x, small))

    def test_a_layer_is_itself_and_a_graph_keeps_its_edges(self, small):
        assert copy.deepcopy(rgat) is rgat and pickle.loads(pickle.dumps(rgat)) is rgat
        assert copy.deepcopy(small) is small
        other = pickle.loads(pickle.dumps(small))
        args = (torch.randn(20, 8), torch.randn(4, 8, 8))
        assert int(other.token) != int(small.token) and repr(other) == repr(small)
        assert torch.equal(rgcn(other, *args), rgcn(small, *args))


@dynamo
def test_exported_programs_hold_the_layer(small):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W = torch.nn.Parameter(torch.randn(4, 8, 8))
            self.root = torch.nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return rgcn_mean(small, x, self.W, self.root, self.root[0])

    small.prepare()
    model, x = Model(), torch.randn(20, 8)
    program = torch.export.export(model, (x,), strict=False)
    assert any("rgnn_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


@dynamo
def test_an_export_that_would_sort_edges_says_what_to_export():
    conv = RGCNConv(8, 8, 4)
    edges = torch.tensor([[0, 1], [1, 0]]), torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"torch\.export cannot sort edges: .*Graph.*prepare"):
        torch.export.export(conv, (torch.randn(20, 8), *edges), strict=False)
