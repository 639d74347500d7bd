"""Whole layers on the GPU's kernels in Triton's interpreter: forward and every gradient.

Each is compared with itself in float64, run by the reference; `tests/nn` compares that with PyTorch
Geometric's. Sources and destinations differ, heads are joined and averaged, edges have features.
"""

import contextlib
import copy
import itertools

import pytest
import torch
from rgnn_layers import gated, heads, tensors

from dataeff import nn, rgnn
from dataeff.nn.comp_gcn_conv import COMPOSITIONS
from dataeff.nn.rgat_conv import MECHANISMS, MODES, MODS
from dataeff.rgnn.plan import watched_plans

pytest.importorskip("triton")

SRC, DST, EDGES, RELATIONS, WIDTH = 9, 6, 24, 3, 6
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# Errors are relative, but to no less than this: what attention sums to zero has only rounding left.
SMALLEST = {torch.float32: 0.05, torch.bfloat16: 1.0, torch.float16: 1.0}


@contextlib.contextmanager
def backend(name):
    """Layers run on this backend."""
    from dataeff.kernels import interpreter, typed_gemm

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("DATAEFF_RGNN_BACKEND", name)
        if name == "triton":
            stack.enter_context(interpreter.interpreted(typed_gemm))
        yield


def edges(num_src=SRC, num_dst=SRC):
    """Sources, destinations and relations, with repeated edges and a node that none leads to."""
    index = torch.stack([torch.randint(num_src, (EDGES,)), torch.randint(num_dst - 1, (EDGES,))])
    index[:, 1] = index[:, 0]
    return index, torch.randint(RELATIONS, (EDGES,))


def rows(*shape):
    return torch.randn(shape).mul(0.5)


def check(run, model, named, dtype=torch.float32):
    """Compare `run(model, **named)` and its gradients with those of float64 on the reference.

    `run` returns a tensor or several; `model` is a module, or None.
    """
    found = []
    for name, kind in (("triton", dtype), ("reference", torch.float64)):
        mine = None if model is None else copy.deepcopy(model).to(dtype).to(kind)
        given = {k: v.to(dtype).to(kind).requires_grad_() for k, v in named.items()}
        with backend(name), watched_plans() as plans:
            outputs = run(mine, **given)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.manual_seed(1)
            assert {plan.compiled.forward_runner.name for plan in plans} == {name}
            loss = sum((y * torch.randn(y.shape).to(dtype).to(kind)).sum() for y in outputs)
            inputs = given if mine is None else given | dict(mine.named_parameters())
            gradients = torch.autograd.grad(
                loss, list(inputs.values()), allow_unused=True, materialize_grads=True
            )
        names = [*(f"output {k}" for k in range(len(outputs))), *inputs]
        found.append(dict(zip(names, (*outputs, *gradients), strict=True)))
    for name, want in found[1].items():
        have = found[0][name]
        assert have.dtype == dtype and have.shape == want.shape
        error = (have.double() - want).norm() / want.norm().clamp(min=SMALLEST[dtype])
        assert error < TOLERANCE[dtype], f"{name}: {error}"


RGCN = [
    *({"aggr": aggr} for aggr in ("mean", "add", "max")),
    {"num_bases": 2, "aggr": "mean"},
    {"num_blocks": 2, "aggr": "add", "root_weight": False},
]


@pytest.mark.parametrize("pair", [False, True], ids=["one set", "pair"])
@pytest.mark.parametrize("options", RGCN, ids=str)
def test_rgcn(options, pair):
    index, etype = edges(SRC, DST if pair else SRC)
    model = nn.RGCNConv(WIDTH, 4, RELATIONS, **options)
    named = {"x": rows(SRC, WIDTH)} | ({"x_dst": rows(DST, WIDTH)} if pair else {})
    check(lambda m, x, x_dst=None: m((x, x_dst) if pair else x, index, etype), model, named)


# Every pairing of the attention's options, with heads, joining, pairs and edge features in turn.
RGAT = [
    {
        "attention_mode": mode,
        "attention_mechanism": mechanism,
        "mod": mod,
        "dim": 2 if mode == MODES[1] and number % 2 else 1,
        "heads": (2, 4)[number // 2 % 2],
        "concat": number % 3 > 0,
        "edge_dim": (None, 3)[number // 3 % 2],
    }
    for number, (mode, mechanism, mod) in enumerate(
        itertools.product(MODES, MECHANISMS, (None, *MODS))
    )
]
RGAT += [{"aggr": aggr, "heads": 2, "attention_mode": m} for aggr in ("mean", "max") for m in MODES]
RGAT += [{"num_blocks": 2, "heads": 4}, {"num_bases": 2, "heads": 1, "edge_dim": 3}]


@pytest.mark.parametrize(
    ("options", "pair"), [(options, bool(k % 2)) for k, options in enumerate(RGAT)], ids=str
)
def test_rgat(options, pair):
    index, etype = edges(SRC, DST if pair else SRC)
    model = nn.RGATConv(WIDTH, 4, RELATIONS, **options)
    named = {"x": rows(SRC, WIDTH)}
    named |= {"x_dst": rows(DST, WIDTH)} if pair else {}
    named |= {"attr": rows(EDGES, 3)} if options.get("edge_dim") else {}

    def run(m, x, x_dst=None, attr=None):
        both = (x, x_dst) if pair else x
        out, (_, alpha) = m(both, index, etype, edge_attr=attr, return_attention_weights=True)
        return out, alpha

    check(run, model, named)


SCHEMAS = {
    "one node type": ({"a": SRC}, [("a", "r", "a"), ("a", "s", "a")]),
    "bipartite": ({"a": SRC, "b": DST}, [("a", "to", "b")]),
    "three types": (
        {"a": 5, "b": 4, "c": 2},
        [("a", "to", "b"), ("b", "to", "a"), ("a", "on", "c"), ("c", "to", "c"), ("b", "on", "c")],
    ),
}


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_hgt(schema, num_heads):
    counts, relations = SCHEMAS[schema]
    index = {
        key: torch.stack([torch.randint(counts[key[k]], (9,)) for k in (0, 2)]) for key in relations
    }
    model = nn.HGTConv(WIDTH, 8, (list(counts), relations), heads=num_heads)
    named = {key: rows(count, WIDTH) for key, count in counts.items()}

    def run(m, **x):
        return tuple(y for y in m(x, index).values() if y is not None)

    check(run, model, named)


@pytest.mark.parametrize(("num_heads", "concat"), [(2, True), (4, False)])
@pytest.mark.parametrize("previous", [False, True])
def test_simple_hgn(num_heads, concat, previous):
    index, etype = edges()
    model = nn.SimpleHGNConv(WIDTH, 4, RELATIONS, 5, heads=num_heads, concat=concat, beta=0.3)
    named = {"x": rows(SRC, WIDTH)}
    named |= {"previous": torch.rand(EDGES, num_heads)} if previous else {}
    check(lambda m, x, previous=None: m(x, index, etype, previous), model, named)


@pytest.mark.parametrize(
    ("composition", "norm", "weighted"),
    [(composition, k != 1, k < 2) for k, composition in enumerate(COMPOSITIONS)],
)
def test_comp_gcn(composition, norm, weighted):
    index, etype = edges()
    model = nn.CompGCNConv(WIDTH, 4, RELATIONS, composition, norm)
    named = {"x": rows(SRC, WIDTH), "relation": rows(2 * RELATIONS, WIDTH)}
    named |= {"weight": torch.rand(EDGES)} if weighted else {}
    check(lambda m, x, relation, weight=None: m(x, relation, index, etype, weight), model, named)


@pytest.mark.parametrize("layer", [gated, heads], ids=lambda f: f.name)
def test_layers_in_no_paper_on_a_sampled_block(layer):
    index, etype = edges(SRC, DST)
    block = rgnn.Graph(
        index, etype, num_src_nodes=SRC, num_dst_nodes=DST, num_relations=RELATIONS + 1
    )
    named = tensors(layer, SRC, EDGES, RELATIONS + 1, torch.float32)
    check(lambda _, **given: layer(block, **given), None, named)


HALVES = {
    "rgcn": (nn.RGCNConv(WIDTH, 8, RELATIONS), ["x"]),
    "rgat": (nn.RGATConv(WIDTH, 8, RELATIONS, heads=2, edge_dim=3), ["x", "edge_attr"]),
    "simple_hgn": (nn.SimpleHGNConv(WIDTH, 8, RELATIONS, 4, heads=2), ["x"]),
    "comp_gcn": (nn.CompGCNConv(WIDTH, 8, RELATIONS, "mult", norm=True), ["x", "relation"]),
    "hgt": (nn.HGTConv(WIDTH, 8, (["a"], [("a", "to", "a")]), heads=2), ["x"]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALVES)
def test_half_precision(name, dtype):
    index, etype = edges()
    model, wanted = HALVES[name]
    model.reset_parameters()
    counts = {"x": SRC, "relation": 2 * RELATIONS}
    named = {k: rows(EDGES, 3) if k == "edge_attr" else rows(counts[k], WIDTH) for k in wanted}

    def run(m, x, **more):
        if name == "hgt":
            return m({"a": x}, {("a", "to", "a"): index})["a"]
        return m(x, edge_index=index, edge_type=etype, **more)

    check(run, model, named, dtype)
