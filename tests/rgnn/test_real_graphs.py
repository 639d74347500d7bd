"""Real relational graphs: the code of the installed Python, and those that ship inside pykeen.

pykeen's files are read out of its wheel, which `make` downloads and nobody installs.
"""

import zipfile
from pathlib import Path

import pytest
import torch
from rgnn_layers import rgat, rgat_dense, rgcn_mean, rgcn_mean_dense

from dataeff import rgnn
from dataeff.data import build_code_graph


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


@pytest.mark.parametrize("name", ["nations", "kinships", "umls"])
def test_pykeen_graphs(name):
    check(*triples(name))


def test_the_code_graph():
    data = build_code_graph(scale=0.02, min_files=4)
    few = (data.edge_index < 200).all(0)  # the plain formula loops over nodes
    check(data.edge_index[:, few], data.edge_type[few], 200, int(data.edge_type.max()) + 1)
