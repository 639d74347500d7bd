"""Real relational graphs: the code of the installed Python, and those that ship inside pykeen.

pykeen's files are read out of its wheel, which `make` downloads and nobody installs.
"""

import zipfile
from pathlib import Path

import pytest
import torch
from rgnn_layers import rgat, rgat_dense, rgcn_mean, rgcn_mean_dense

from dataeff import nn, rgnn
from dataeff.data import build_code_graph

pyg = pytest.importorskip("torch_geometric.nn")


def triples(name):
    """(edge_index, edge_type, number of nodes, number of relations) of a pykeen data set."""
    wheels = sorted((Path(__file__).parents[2] / "build" / "wheels").glob("pykeen-*.whl"))
    if not wheels:
        pytest.skip("no wheel of pykeen in build/wheels: make install downloads it")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        text = wheel.read(f"pykeen/datasets/{name}/train.txt").decode()
    rows = [line.split("\t") for line in text.splitlines()]
    nodes = {n: i for i, n in enumerate(sorted({r[0] for r in rows} | {r[2] for r in rows}))}
    kinds = {k: i for i, k in enumerate(sorted({r[1] for r in rows}))}
    ids = torch.tensor([(nodes[h], kinds[r], nodes[t]) for h, r, t in rows])
    return ids[:, [0, 2]].t(), ids[:, 1], len(nodes), len(kinds)


def check(edge_index, edge_type, nodes, relations):
    graph = rgnn.Graph(edge_index, edge_type, num_nodes=nodes, num_relations=relations)
    torch.manual_seed(0)

    def leaf(*shape):
        return (0.3 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()

    x, W, c = leaf(nodes, 8), leaf(relations, 8, 6), (relations, 6)
    for layer, plain, args in (
        (rgcn_mean, rgcn_mean_dense, (x, W, leaf(8, 6), leaf(6))),
        (rgat, rgat_dense, (x, W, leaf(*c), leaf(*c))),
    ):
        ours, theirs = layer(graph, *args), plain(edge_index, edge_type, *args)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        got = torch.autograd.grad(ours.sin().sum(), args)
        want = torch.autograd.grad(theirs.sin().sum(), args)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def drop_ins(relations):
    """Our layers and PyG's with the same parameters, and how each takes one kind of node."""
    names = [("n", f"r{r}", "n") for r in range(relations)]

    def plain(conv, x, edge_index, edge_type):
        return conv(x, edge_index, edge_type)

    def typed(conv, x, edge_index, edge_type):
        edges = {key: edge_index[:, edge_type == r] for r, key in enumerate(names)}
        return conv({"n": x}, edges)["n"]

    for name, call, kinds, options in (
        ("RGCNConv", plain, relations, {}),
        ("RGATConv", plain, relations, {"heads": 2}),
        ("HGTConv", typed, (["n"], names), {"heads": 2}),
    ):
        theirs = getattr(pyg, name)(8, 6, kinds, **options)
        ours = getattr(nn, name)(8, 6, kinds, **options)
        ours.load_state_dict(theirs.state_dict())
        yield call, ours, theirs


def check_drop_ins(edge_index, edge_type, nodes, relations, dtype, tolerance):
    torch.manual_seed(0)
    x = (0.3 * torch.randn(nodes, 8)).to(dtype).requires_grad_()
    for call, ours, theirs in drop_ins(relations):
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        found = []
        for conv in (ours, theirs):
            y = call(conv, x, edge_index, edge_type)
            loss = (y * torch.cos(torch.arange(y.numel(), dtype=dtype)).view(y.shape)).sum()
            parameters = dict(conv.named_parameters())
            grads = torch.autograd.grad(
                loss, [x, *parameters.values()], allow_unused=True, materialize_grads=True
            )
            found.append({"y": y} | dict(zip(["x", *parameters], grads, strict=True)))
        for name, want in found[1].items():
            scale = max(1.0, float(want.detach().abs().max()))
            torch.testing.assert_close(found[0][name], want, rtol=tolerance, atol=tolerance * scale)


GRAPHS = pytest.mark.parametrize("name", ["nations", "kinships", "umls"])


@GRAPHS
def test_pykeen_graphs(name):
    check(*triples(name))


@GRAPHS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
def test_drop_ins_on_pykeen_graphs(name, dtype, tolerance):
    check_drop_ins(*triples(name), dtype, tolerance)


@pytest.fixture(scope="module")
def code():
    """Sources, destinations, relations and sizes of a part of the installed Python's code."""
    data = build_code_graph(scale=0.02, min_files=4)
    few = (data.edge_index < 200).all(0)  # the plain formula loops over nodes
    return data.edge_index[:, few], data.edge_type[few], 200, int(data.edge_type.max()) + 1


def test_the_code_graph(code):
    check(*code)


def test_drop_ins_on_the_code_graph(code):
    check_drop_ins(*code, torch.float64, 1e-10)
