"""Batches of layer calls equal the plain formula's: `torch.func.vmap` and `is_grads_batched`."""

import pytest
import torch
from rgnn_layers import gated, rgcn
from torch.autograd.functional import jacobian
from torch.func import grad, grad_and_value, jacrev, jvp, vmap

from dataeff import rgnn

EDGES = torch.randint(0, 9, (2, 30), generator=torch.Generator().manual_seed(3))
TYPES = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(4))
# Dynamo makes an instance of the autograd function, and asks resumed frames for gradients of what
# is no leaf; it hides both warnings from users.
dynamo = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
)


def plain(x, W):
    messages = torch.einsum("ei,eio->eo", x[EDGES[0]], W[TYPES])
    return messages.new_zeros(x.shape[0], W.shape[2]).index_add(0, EDGES[1], messages)


@pytest.fixture
def compiled():
    graph = rgnn.Graph(EDGES, TYPES, num_nodes=9, num_relations=4).prepare()
    return lambda x, W: rgcn(graph, x, W)


@pytest.fixture
def single():
    return (torch.randn(9, 8, dtype=torch.float64), torch.randn(4, 8, 8, dtype=torch.float64))


@pytest.fixture
def batch():
    return (torch.randn(3, 9, 8, dtype=torch.float64), torch.randn(3, 4, 8, 8, dtype=torch.float64))


def loss(function):
    return lambda x, W: function(x, W).square().sum()


def same(compiled, transform, *args):
    torch.testing.assert_close(transform(compiled)(*args), transform(plain)(*args))


DIMS = [(0, None), (None, 0), (0, 0), (2, 3), (-1, -2)]


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("leaves", [False, True])
def test_values_and_gradients_of_a_vmap(compiled, single, batch, dims, leaves):
    args = [
        (one if dim is None else many.movedim(0, dim).contiguous()).requires_grad_(leaves)
        for one, many, dim in zip(single, batch, dims, strict=True)
    ]
    same(compiled, lambda f: vmap(f, in_dims=dims), *args)
    same(compiled, lambda f: vmap(f, in_dims=dims, out_dims=1, chunk_size=2), *args)
    same(compiled, lambda f: vmap(grad(loss(f), argnums=(0, 1)), in_dims=dims), *args)
    same(compiled, lambda f: grad(lambda *a: loss(vmap(f, in_dims=dims))(*a), (0, 1)), *args)
    if leaves:
        found = [
            torch.autograd.grad(loss(vmap(f, in_dims=dims))(*args), args) for f in (compiled, plain)
        ]
        torch.testing.assert_close(*found)


def test_nested_vmaps(compiled, batch):
    x, W = batch[0].requires_grad_(), batch[1].requires_grad_()

    def pairs(f):
        return vmap(lambda a: vmap(lambda b: f(a, b))(W))(x)

    torch.testing.assert_close(pairs(compiled), pairs(plain))
    found = [torch.autograd.grad(pairs(f).square().sum(), (x, W)) for f in (compiled, plain)]
    torch.testing.assert_close(*found)


def test_values_beside_gradients_of_samples_reach_parameters(compiled, single, batch):
    W = single[1].requires_grad_()

    def values(f):
        return vmap(grad_and_value(lambda x: loss(f)(x, W)))(batch[0])[1]

    found = [torch.autograd.grad(values(f).sum(), W) for f in (compiled, plain)]
    torch.testing.assert_close(*found)


def test_a_batch_without_samples(compiled, single, batch):
    assert vmap(compiled, in_dims=(0, None))(batch[0][:0], single[1]).shape == (0, 9, 8)
    found = vmap(grad(loss(compiled)), in_dims=(0, None))(batch[0][:0], single[1])
    assert found.shape == (0, 9, 8)


def test_batches_of_output_gradients(compiled, single):
    x, W = (t.requires_grad_() for t in single)
    grads = torch.randn(5, 9, 8, dtype=torch.float64)
    found = [
        torch.autograd.grad(f(x, W), (x, W), grads, is_grads_batched=True)
        for f in (compiled, plain)
    ]
    torch.testing.assert_close(*found)
    y = compiled(x, W)
    for _ in range(2):
        again = torch.autograd.grad(y, (x, W), grads, is_grads_batched=True, retain_graph=True)
        torch.testing.assert_close(again, found[1])


def test_batches_of_gradients_of_two_results_of_which_backward_reads_one(small):
    @rgnn.layer
    def both(g, x, W):
        y = rgnn.exp(g.sum(rgnn.linear(g.src(x), W[g.etype])))
        return y, g.at_dst(x) * 2.0

    x, W = 0.1 * torch.randn(20, 8), 0.1 * torch.randn(4, 8, 8)
    x.requires_grad_()
    grads = torch.randn(3, 20, 8), torch.randn(3, 20, 8)
    outputs = both(small, x, W)
    found = torch.autograd.grad(outputs, x, grads, is_grads_batched=True, retain_graph=True)
    want = [
        torch.autograd.grad(outputs, x, g, retain_graph=True)[0] for g in zip(*grads, strict=True)
    ]
    torch.testing.assert_close(found[0], torch.stack(want))


def test_jacobians(compiled, single):
    same(compiled, lambda f: jacrev(lambda *a: f(*a).sum(0), argnums=(0, 1)), *single)
    same(compiled, lambda f: jacrev(lambda *a: f(*a).sum(0), chunk_size=3), *single)
    for vectorize in (False, True):
        same(
            compiled,
            lambda f, v=vectorize: lambda *a: jacobian(lambda *b: f(*b).sum(0), a, vectorize=v),
            *single,
        )


def test_edge_values_of_samples(small):
    args = torch.randn(20, 8), torch.randn(4, 8, 8), torch.randn(8, 8), torch.randn(4)
    weights = torch.randn(3, 60)
    got = vmap(lambda e: gated(small, *args, e))(weights)
    torch.testing.assert_close(got, torch.stack([gated(small, *args, e) for e in weights]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch itself
def test_forward_mode_of_a_batch_is_refused_and_not_zero(compiled, single, batch):
    def f(x):
        return vmap(lambda a: compiled(a, single[1]))(x)

    with pytest.raises(
        NotImplementedError, match=r"no forward-mode derivative: use torch\.func\.vjp"
    ):
        jvp(f, (batch[0],), (batch[0],))
    with pytest.raises(
        NotImplementedError, match=r"no forward-mode derivative: use torch\.func\.vjp"
    ):
        vmap(lambda t: jvp(lambda a: compiled(a, single[1]), (single[0],), (t,))[1])(batch[0])


def test_edges_of_samples_are_refused(single):
    def run(edges, types):
        return rgcn(rgnn.Graph(edges, types, num_nodes=9, num_relations=4), *single)

    with pytest.raises(ValueError, match=r"edge_index is batched by vmap.*in_dims=None"):
        vmap(run, in_dims=(0, None))(torch.stack([EDGES, EDGES]), TYPES)
    with pytest.raises(ValueError, match="edge_type is batched by vmap"):
        vmap(grad(lambda x, t: run(EDGES, t).sum() * x), in_dims=(None, 0))(
            torch.ones(()), torch.stack([TYPES, TYPES])
        )


class TestCompiler:
    """torch.compile differentiates operators within transforms, not autograd functions."""

    TRANSFORMS = (
        lambda f: vmap(f, in_dims=(None, 0)),
        lambda f: vmap(grad(loss(f)), in_dims=(None, 0)),
        lambda f: grad(lambda x, W: loss(vmap(f, in_dims=(None, 0)))(x, W)),
    )

    @dynamo
    @pytest.mark.parametrize("transform", TRANSFORMS)
    def test_transforms_with_gradients_run_uncompiled(self, compiled, single, batch, transform):
        torch._dynamo.reset()
        args = single[0], batch[1]
        found = torch.compile(transform(compiled), backend="aot_eager")(*args)
        torch.testing.assert_close(found, transform(plain)(*args))

    @dynamo
    def test_what_a_compiled_vmap_is_of_gets_its_gradient(self, compiled, single, batch):
        torch._dynamo.reset()
        args = single[0].requires_grad_(), batch[1].requires_grad_()
        function = torch.compile(vmap(compiled, in_dims=(None, 0)), backend="aot_eager")
        got = torch.autograd.grad(loss(function)(*args), args)
        want = torch.autograd.grad(loss(vmap(plain, in_dims=(None, 0)))(*args), args)
        torch.testing.assert_close(got, want)

    @dynamo
    def test_one_graph_is_refused_with_gradients_and_made_without(self, compiled, single, batch):
        torch._dynamo.reset()
        args = single[0], batch[1]
        function = torch.compile(
            vmap(compiled, in_dims=(None, 0)), fullgraph=True, backend="aot_eager"
        )
        with pytest.raises(torch._dynamo.exc.Unsupported, match="leave out fullgraph"):
            function(*args)
        with torch.no_grad():
            torch.testing.assert_close(function(*args), vmap(plain, in_dims=(None, 0))(*args))
