"""Weights of node types times weights of relations: HGT's reordering."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dataeff import rgnn
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.ir import Builder, Type
from dataeff.rgnn.passes.pipeline import OPTIONAL
from dataeff.rgnn.plan import Plan, disabled_passes
from dataeff.rgnn.text import render
from dataeff.rgnn.view import View

RELATIONS = [("a", "r", "b"), ("b", "s", "a"), ("b", "t", "b"), ("c", "u", "a"), ("a", "v", "c")]
NODES = {"a": 300, "b": 500, "c": 40}


@contextlib.contextmanager
def running_on(name):
    """Layers run on this backend, Triton's kernels in its interpreter."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("DATAEFF_RGNN_BACKEND", name)
        if name == "triton":
            from dataeff.kernels import interpreter, typed_gemm

            stack.enter_context(interpreter.interpreted(typed_gemm))
        yield


@rgnn.layer
def hgt(g, x, K, bk, Q, V, A, M):
    k, q = rgnn.linear(x, K[g.ntype]) + bk[g.ntype], rgnn.linear(g.at_dst(x), Q[g.ntype])
    score = rgnn.dot(rgnn.linear(g.src(k), A[g.etype]), g.dst(q))
    message = rgnn.linear(g.src(rgnn.linear(x, V[g.ntype])), M[g.etype])
    return g.sum(rgnn.edge_softmax(score) * message)


@rgnn.layer
def both_ends(g, x, K, W):
    """The same projection at both ends, whose types differ."""
    z = rgnn.linear(x, K[g.ntype])
    return g.sum(rgnn.linear(g.src(z), W[g.etype]) * rgnn.linear(g.dst(z), W[g.etype]))


def problem(heads=1, width_in=4, width=4, more_relations=0, nodes=NODES, edges=400):
    g = torch.Generator().manual_seed(0)
    typed = {
        r: torch.stack([torch.randint(0, nodes[r[k]], (edges,), generator=g) for k in (0, 2)])
        for r in RELATIONS
    }
    graph = rgnn.Graph.from_typed(typed, nodes)

    def leaf(*shape):
        value = torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5
        return value.requires_grad_()

    types, relations = len(nodes), len(RELATIONS) + more_relations
    K, Q, V = (leaf(types, width_in, heads, width) for _ in range(3))
    A, M = (leaf(relations, heads, width, width) for _ in range(2))
    return graph, (leaf(sum(nodes.values()), width_in), K, leaf(types, heads, width), Q, V, A, M)


def dense(graph, x, K, bk, Q, V, A, M):
    """Edge by edge, with a copy of every weight."""
    src, dst = graph.edge_index
    ntype, etype = graph.node_type.long(), graph.edge_type
    k = torch.einsum("ni,nihd->nhd", x, K[ntype]) + bk[ntype]
    q, v = (torch.einsum("ni,nihd->nhd", x, W[ntype]) for W in (Q, V))
    score = (torch.einsum("ehd,ehdo->eho", k[src], A[etype]) * q[dst]).sum(-1)
    weight = torch.exp(score)
    total = torch.zeros(x.shape[0], score.shape[1], dtype=x.dtype).index_add(0, dst, weight)
    message = torch.einsum("ehd,ehdo->eho", v[src], M[etype])
    message = (weight / total[dst])[..., None] * message
    return torch.zeros_like(q).index_add(0, dst, message)


def test_golden():
    """`DATAEFF_UPDATE_GOLDEN=1` writes the file again."""
    graph, args = problem()
    found = hgt.plan(graph, *args).compiled.stages
    text = "\n".join(f"== {name} ==\n{render(program)}" for name, program in found)
    path = Path(__file__).parent / "golden" / "hgt.expected"
    if os.environ.get("DATAEFF_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def stages(layer, graph, args):
    return [name for name, _ in layer.plan(graph, *args).compiled.stages]


@pytest.mark.parametrize("disabled", [(), *((name,) for name in OPTIONAL)], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_hgt_is_right_with_each_pass_left_out(heads, disabled):
    graph, args = problem(heads)
    with disabled_passes(*disabled):
        got = hgt(graph, *args)
        have = torch.autograd.grad(got.square().sum(), args)
    want = dense(graph, *args)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(have, torch.autograd.grad(want.square().sum(), args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_it_folds_for_one_head_and_not_where_heads_widen_the_product():
    assert "fold_types" in stages(hgt, *problem(heads=1))
    assert "fold_types" not in stages(hgt, *problem(heads=8, width_in=32))


def test_kernels_built_ahead_of_time_are_those_of_typed_edges():
    from dataeff.nn.published import PUBLISHED
    from dataeff.rgnn.plan import Request, spec_of

    found = PUBLISHED["hgt"]
    shapes = found.shapes(100_000, 4, 64, 64, 1, 64)
    sizes = (100_000, 100_000, 1_000_000, 400_000, 400_000, 64, 4)
    ran = []
    for typed in (False, True):
        spec = spec_of(tuple(shapes), (), typed=typed)
        request = Request(
            found.layer.id, spec, tuple(shapes.values()), torch.float32, "cuda", sizes, 0
        )
        ran.append("fold_types" in [n for n, _ in Plan(request, backend="triton").compiled.stages])
    assert ran == [False, True] and found.typed


class AddedUpByIndex(TorchDispatchMode):
    """Notes operators that a GPU carries out by atomic additions, in the order that they come."""

    NAMES = ("index_add", "index_reduce", "scatter_add", "scatter_reduce", "bincount", "put")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.partition(".")[0].strip("_") in self.NAMES:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def many_relations(num_relations=40, edges=6):
    """Relations from and to two types, as `Graph.from_typed` takes them."""
    g = torch.Generator().manual_seed(0)
    nodes = {"a": 900, "b": 700}
    ends = [("a", "b") if k % 3 else ("b", "a") for k in range(num_relations)]
    typed = {
        (s, f"r{k}", d): torch.stack(
            [torch.randint(nodes[n], (edges,), generator=g) for n in (s, d)]
        )
        for k, (s, d) in enumerate(ends)
    }
    return rgnn.Graph.from_typed(typed, nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("more_relations", [0, 3])
@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_relations_of_a_node_type_are_added_up_and_rounded_once(backend, more_relations, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    graph = many_relations()
    relations = 40 + more_relations
    builder = Builder()
    rows = builder.emit("input", attrs=("rows",), type=Type("etype", (3, 2)))
    sums = [builder.emit("sum", rows, attrs=(f"etype.{end}_ntype",)) for end in ("src", "dst")]
    x = torch.rand(relations, 3, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    runner = Runner(builder.program(sums), dtype, "cpu", backend)
    with running_on(backend):
        got = runner(View(graph, (*graph.sizes[:5], relations, 2)), {"rows": x})
    for found, ends in zip(got, graph.relation_ends, strict=True):
        ends = torch.nn.functional.pad(ends, (0, more_relations))
        want = x.new_zeros(2, 3, 2, dtype=torch.float64).index_add(0, ends, x.double())
        # Half an ulp, and what float32 loses on the way. Triton's interpreter cuts bfloat16 off.
        rtol = torch.finfo(dtype).eps * (1.01 if dtype.itemsize == 2 else 8)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=rtol, atol=0)


def test_gradients_of_node_types_with_many_relations_in_half_precision():
    pytest.importorskip("triton")
    graph = many_relations()
    g = torch.Generator().manual_seed(2)
    projection, relation = (2, 4, 1, 4), (40, 1, 4, 4)
    shapes = [(1600, 4), projection, (2, 1, 4), projection, projection, relation, relation]
    half = [(torch.randn(s, generator=g) * 0.5).to(torch.bfloat16).requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in half]
    plan = Plan(hgt.plan(graph, *half).request, backend="triton")
    assert "fold_types" in [name for name, _ in plan.compiled.stages]
    view, args = View(graph, plan.sizes), [t.detach() for t in half]
    with running_on("triton"), AddedUpByIndex() as added_up:
        (y,), saved = plan.run_forward(view, args)
        given = torch.randn(y.shape, generator=g).to(y)
        have = plan.run_backward(view, [given], args, [y], saved)
    assert not added_up.found
    want = torch.autograd.grad(hgt(graph, *exact), exact, given.double())
    for a, b in zip(have, want, strict=True):
        assert (a - b).norm() < 2e-2 * b.norm()


def test_it_takes_the_type_of_the_end_that_is_read():
    graph, (x, K, *_, A, _) = problem()
    got = both_ends(graph, x, K.squeeze(2), A.squeeze(1))
    z = torch.einsum("ni,nid->nd", x, K.squeeze(2)[graph.node_type.long()])
    src, dst = graph.edge_index
    W = A.squeeze(1)[graph.edge_type]
    sides = (torch.einsum("ed,edo->eo", z[end], W) for end in (src, dst))
    want = torch.zeros_like(z).index_add(0, dst, torch.mul(*sides))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_weights_may_know_more_relations_than_the_graph():
    graph, args = problem(more_relations=2)
    got = hgt(graph, *args)
    torch.testing.assert_close(got, dense(graph, *args), rtol=1e-10, atol=1e-10)
    *_, dA, _ = torch.autograd.grad(got.sum(), args)
    assert dA[:5].any() and not dA[5:].any()


def test_a_graph_of_mixed_relations_is_left_alone():
    """Where a relation leads from nodes of several types there is no weight per relation."""
    graph, args = problem()
    mixed = rgnn.Graph(
        graph.edge_index, graph.edge_type.flip(0), num_nodes=840, node_type=graph.node_type
    )
    assert "fold_types" not in stages(hgt, mixed, args)
    torch.testing.assert_close(hgt(mixed, *args), dense(mixed, *args), rtol=1e-10, atol=1e-10)


def test_triton_kernels_of_the_folded_program(monkeypatch):
    pytest.importorskip("triton")
    from dataeff.rgnn.interpret import interpret

    graph, args = problem(nodes={"a": 18, "b": 20, "c": 4}, edges=8)
    args = [a.detach().float() for a in args]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plan = Plan(hgt.plan(graph, *args).request, backend="triton")
    assert "fold_types" in [name for name, _ in plan.compiled.stages]
    view, named = View(graph, plan.sizes), dict(zip(plan.request.names, args, strict=True))
    want = interpret(plan.compiled.forward, view, named)
    for a, b in zip(plan.compiled.forward_runner(view, named), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
