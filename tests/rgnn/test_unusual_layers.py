"""Four layers in no paper against their formulas: results, all gradients, and what torch does."""

import copy
import threading

import pytest
import torch

from dataeff import rgnn
from dataeff.rgnn import plan
from dataeff.rgnn.kernels_ir import parse_schedule, render_schedule
from dataeff.rgnn.passes.pipeline import OPTIONAL
from dataeff.rgnn.text import parse, render

WIDTH, HEADS, TYPES = 6, 2, 3


@rgnn.layer
def two_hops(g, x, W, V, e, c):
    """What a node hears from its neighbours through weights of its type gates a second hearing."""
    first = g.sum(rgnn.tanh(rgnn.linear(g.src(x), W[g.etype]) * g.edge(e)))
    typed = rgnn.linear(first, V[g.ntype]) + c[g.ntype]
    gate = rgnn.sigmoid(rgnn.dot(g.dst(typed), g.src(x)))
    return g.mean(gate * rgnn.linear(g.src(x), W[g.etype]) * g.edge(e)) + typed


def two_hops_formula(ids, etype, ntype, x, W, V, e, c):
    src, dst = ids
    z = torch.einsum("ei,eio->eo", x[src], W[etype])
    first = torch.zeros_like(x).index_add(0, dst, torch.tanh(z * e))
    typed = torch.einsum("ni,nio->no", first, V[ntype]) + c[ntype]
    gate = torch.sigmoid((typed[dst] * x[src]).sum(-1))
    total = torch.zeros_like(x).index_add(0, dst, gate[:, None] * z * e)
    count = torch.bincount(dst, minlength=x.shape[0]).clamp(min=1)
    return total / count[:, None] + typed


@rgnn.layer
def attended_maximum(g, x, W, a):
    """Maxima of messages that a softmax of each head weighs."""
    z = rgnn.reshape(rgnn.linear(g.src(x), W[g.etype]), HEADS, -1)
    score = rgnn.leaky_relu(rgnn.dot(z, a[g.etype]), 0.2)
    return g.max(rgnn.edge_softmax(score) * z)


def attended_maximum_formula(ids, etype, ntype, x, W, a):
    src, dst = ids
    z = torch.einsum("ei,eio->eo", x[src], W[etype]).unflatten(1, (HEADS, -1))
    score = torch.nn.functional.leaky_relu((z * a[etype]).sum(-1), 0.2)
    none = 0 * z.sum(0) + 0 * x.sum()
    out = []
    for node in range(x.shape[0]):
        mine = dst == node
        heard = torch.softmax(score[mine], 0)[:, :, None] * z[mine]
        out.append(heard.amax(0) if mine.any() else none)
    return torch.stack(out)


@rgnn.layer
def normed_by_relation(g, x, W, scale, shift):
    """Messages of each relation brought to length one, then stretched as the relation says."""
    z = rgnn.linear(g.src(x), W[g.etype])
    unit = z / rgnn.sqrt(1.0 + rgnn.dot(z, z))
    pooled = g.per_relation.mean(unit * scale[g.etype] + shift[g.etype])
    return g.sum(pooled), g.max(g.per_relation.sum(rgnn.gelu(z)))


def normed_by_relation_formula(ids, etype, ntype, x, W, scale, shift):
    src, dst = ids
    z = torch.einsum("ei,eio->eo", x[src], W[etype])
    value = z / (1 + (z * z).sum(-1, keepdim=True)).sqrt() * scale[etype] + shift[etype]
    total = x.new_zeros(x.shape[0], W.shape[2])
    sums = [[] for _ in range(x.shape[0])]
    for r in range(W.shape[0]):
        mine = etype == r
        count = torch.bincount(dst[mine], minlength=x.shape[0])
        pooled = torch.zeros_like(total).index_add(0, dst[mine], value[mine])
        total = total + pooled / count.clamp(min=1)[:, None]
        heard = torch.zeros_like(total).index_add(0, dst[mine], torch.nn.functional.gelu(z[mine]))
        for node in count.nonzero()[:, 0].tolist():
            sums[node].append(heard[node])
    zero = 0 * z.sum(0) + 0 * x.sum()
    return total + zero, torch.stack([torch.stack(s).amax(0) if s else zero for s in sums])


@rgnn.layer
def shared_twice(g, x, y, W, U):
    """Between two sets of nodes: one weight at both ends, split, joined, and used once more."""
    left, right = rgnn.split(rgnn.linear(g.src(x), U), (2, WIDTH - 2))
    other = rgnn.linear(g.dst(y), U)
    both = rgnn.relu(rgnn.concat(right, left) - other)
    return g.sum(rgnn.linear(both, W[g.etype]) * rgnn.linear(g.src(x), W[g.etype]))


def shared_twice_formula(ids, etype, ntype, x, y, W, U):
    src, dst = ids
    left, right = (x @ U)[src].split([2, WIDTH - 2], -1)
    both = torch.relu(torch.cat([right, left], -1) - (y @ U)[dst])
    message = torch.einsum("ei,eio->eo", both, W[etype])
    message = message * torch.einsum("ei,eio->eo", x[src], W[etype])
    return y.new_zeros(y.shape[0], W.shape[2]).index_add(0, dst, message) + 0 * x.sum()


LAYERS = {
    two_hops: two_hops_formula,
    attended_maximum: attended_maximum_formula,
    normed_by_relation: normed_by_relation_formula,
    shared_twice: shared_twice_formula,
}
CASES = {  # nodes, edges, relations, of which so many are shown
    "some": (9, 40, 5, 3),
    "zero edges": (4, 0, 2, 2),
    "one node": (1, 6, 3, 3),
    "500 relations": (30, 90, 500, 500),
}


def call_of(layer, case, dtype=torch.float64):
    """A graph, and arguments of the layer as leaves that are not contiguous."""
    nodes, edges, relations, shown = CASES[case]
    g = torch.Generator().manual_seed(0)
    two_sets = layer is shared_twice
    num_dst = nodes + 2 if two_sets else nodes
    ids = torch.stack([torch.randint(n, (edges,), generator=g) for n in (nodes, num_dst)])
    etype = torch.randint(shown, (edges,), generator=g)
    ntype = torch.arange(nodes) % TYPES
    sizes = {"num_src_nodes": nodes, "num_dst_nodes": num_dst}
    if layer is two_hops:
        sizes |= {"node_type": ntype, "num_node_types": TYPES}
    graph = rgnn.Graph(ids, etype, num_relations=relations, **sizes)
    x, square = (nodes, WIDTH), (relations, WIDTH, WIDTH)
    shapes = {
        two_hops: (x, square, (TYPES, WIDTH, WIDTH), (edges, WIDTH), (TYPES, WIDTH)),
        attended_maximum: (x, square, (relations, HEADS, WIDTH // HEADS)),
        normed_by_relation: (x, square, (relations, WIDTH), (relations, WIDTH)),
        shared_twice: (x, (num_dst, WIDTH), square, (WIDTH, WIDTH)),
    }[layer]
    given = []
    for shape in shapes:
        wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=g, dtype=dtype) / 2
        given.append(wide[..., ::2].detach().requires_grad_())
    return (graph, *given), (ids, etype, ntype, *given)


def results(function, args, given):
    """Results, and gradients of a random combination of them."""
    y = function(*args)
    y = y if isinstance(y, tuple) else (y,)
    g = torch.Generator().manual_seed(1)
    total = sum((v * torch.randn(v.shape, generator=g, dtype=v.dtype)).sum() for v in y)
    grads = torch.autograd.grad(total, given, materialize_grads=True)
    return [*(v.detach() for v in y), *grads]


each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.name)


@each_layer
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_formula(layer, case):
    args, plain = call_of(layer, case)
    found, want = results(layer, args, args[1:]), results(LAYERS[layer], plain, args[1:])
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for k in range(1, len(args)):  # gradients of one argument alone
        some = [t.detach() if n != k else t for n, t in enumerate(args[1:], 1)]
        alone = results(layer, (args[0], *some), [args[k]])
        torch.testing.assert_close(alone[-1], want[len(want) - len(args) + k])


@each_layer
@pytest.mark.parametrize("left_out", ["each", "all"])
def test_passes_left_out_change_nothing(layer, left_out):
    args, _ = call_of(layer, "some")
    want = results(layer, args, args[1:])
    for names in [(n,) for n in OPTIONAL] if left_out == "each" else [OPTIONAL]:
        with plan.disabled_passes(*names):
            found = results(layer, args, args[1:])
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@each_layer
def test_texts_parse_back_and_explain_shows_every_stage(layer):
    args, _ = call_of(layer, "some")
    made = layer.plan(*args)
    text = layer.explain(*args)
    for stage, program in made.compiled.stages:
        assert parse(render(program)) == program and stage in text
    for runner in (made.compiled.forward_runner, made.compiled.backward_runner):
        schedule = runner.schedule
        assert parse_schedule(render_schedule(schedule), schedule.program).steps == schedule.steps


@each_layer
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_in_torch_compile_autocast_and_functional_call(layer):
    class Module(torch.nn.Module):
        def __init__(self, given):
            super().__init__()
            self.given = torch.nn.ParameterList(given)

        def forward(self, graph, x):
            # dynamo of torch 2.11 cannot unpack the list itself
            y = layer(graph, x, *[self.given[i] for i in range(len(self.given))])
            return y if isinstance(y, tuple) else (y,)

    (graph, x, *given), _ = call_of(layer, "some", torch.float32)
    module = Module(given)
    want = module(graph.prepare(), x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(graph, x)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    called = torch.func.functional_call(other, module.state_dict(), (graph, x))
    for found in (compiled, called):
        assert all(map(torch.equal, found, want))
    with torch.autocast("cpu", torch.bfloat16):
        halved = module(graph, x)
    assert {v.dtype for v in halved} == {torch.bfloat16}
    for a, b in zip(halved, want, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)


def test_threads_that_call_layers_at_once_get_their_own_results():
    calls = [(layer, call_of(layer, "some")[0]) for layer in LAYERS] * 2
    want = [results(layer, args, args[1:]) for layer, args in calls]
    plan._plan_for.cache_clear()
    plan._COMPILED.clear()
    found, start = [None] * len(calls), threading.Barrier(len(calls))

    def work(k):
        layer, args = calls[k]
        start.wait()
        found[k] = results(layer, args, args[1:])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, want, strict=True):
        assert all(map(torch.equal, a, b))
