"""Which values of the edges are kept once per pair, by how many pairs a graph has."""

import os
from pathlib import Path

import pytest
import torch

from dataeff import rgnn
from dataeff.rgnn import plan as plans
from dataeff.rgnn.passes.compact import compact
from dataeff.rgnn.passes.spread import spread
from dataeff.rgnn.plan import disabled_passes
from dataeff.rgnn.text import parse, render

GOLDEN = Path(__file__).parent / "golden"
NODES, RELATIONS, WIDTH = 40, 4, 16


@rgnn.layer
def two_scores(g, x, W, a, b):
    """A matrix product, and a score of either end."""
    score = rgnn.sigmoid(rgnn.dot(g.src(x), a[g.etype]) + rgnn.dot(g.dst(x), b[g.etype]))
    return g.sum(score * rgnn.linear(g.src(x), W[g.etype]))


def graph_of(src_ratio, dst_ratio, per_relation=32):
    """A graph of these numbers of pairs per edge."""
    g = torch.Generator().manual_seed(0)

    def ends(ratio):
        few = int(ratio * per_relation)
        of_one = [torch.randperm(NODES, generator=g)[:few] for _ in range(RELATIONS)]
        repeated = [ids.repeat(-(-per_relation // few))[:per_relation] for ids in of_one]
        return torch.cat([ids[torch.randperm(per_relation, generator=g)] for ids in repeated])

    relation = torch.arange(RELATIONS).repeat_interleave(per_relation)
    graph = rgnn.Graph(torch.stack([ends(src_ratio), ends(dst_ratio)]), relation, num_nodes=NODES)
    assert (graph.src_pair_ratio, graph.dst_pair_ratio) == (src_ratio, dst_ratio)
    return graph


def arguments():
    shapes = (NODES, WIDTH), (RELATIONS, WIDTH, 12), (RELATIONS, WIDTH), (RELATIONS, WIDTH)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


GRAPHS = {"many": (1.0, 1.0), "few": (0.25, 0.25), "mixed": (1.0, 0.25)}
# The domains of the two scores and of the product.
PLACES = {
    "many": ["edge", "edge", "src_pair"],
    "few": ["src_pair", "dst_pair", "src_pair"],
    "mixed": ["edge", "dst_pair", "src_pair"],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_golden(name):
    """`DATAEFF_UPDATE_GOLDEN=1` writes the files again."""
    compiled = two_scores.plan(graph_of(*GRAPHS[name]), *arguments()).compiled
    products = {op.args[1]: op for op in compiled.forward.ops if op.kind == "linear"}
    inputs = {op.attrs[0]: op.id for op in compiled.forward.inputs}
    assert [products[inputs[w]].type.domain for w in ("a", "b", "W")] == PLACES[name]
    path = GOLDEN / f"compact_{name}.expected"
    text = f"{render(compiled.forward)}\n{render(compiled.backward)}"
    if os.environ.get("DATAEFF_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_where_values_stand_changes_no_result(name, backend, monkeypatch):
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", backend)
    graph, given = graph_of(*GRAPHS[name]), arguments()
    found = []
    for off in ((), ("spread",), ("compact",)):
        with disabled_passes(*off):
            y = two_scores(graph, *given)
            found.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-10, atol=1e-10)


def test_explain_says_what_was_left_and_at_which_ratio():
    def lines(name):
        text = two_scores.explain(graph_of(*GRAPHS[name]), *arguments())
        return [line for line in text.splitlines() if line.startswith("left on edges")]

    assert lines("few") == []
    (source,) = lines("mixed")
    assert "at about 1.00 (source, relation) pairs per edge" in source
    assert "linear : edge[]" in source and "rgnn.dot(g.src(x), a[g.etype])" in source
    assert len(lines("many")) == 2


@pytest.mark.parametrize("end", ["src", "dst"])
@pytest.mark.parametrize(
    ("value", "width", "limit"),
    [
        ("linear(%1, %2) : edge[]", 64, 0.98),
        ("linear(%1, %2) : edge[]", 4, 0.78),
        ("tanh(%1) : edge[64]", 64, 0.95),
        ("neg(%1) : edge[64]", 64, 2.0),
    ],
)
def test_a_value_moves_to_pairs_below_its_ratio(end, value, width, limit):
    node = "node" if end == "src" else "dst"
    kind, row = value.split("(")[0], "" if "[]" in value else f"{width}"
    text = (
        f"%0 = input[x]() : {node}[{width}]\n%1 = gather[edge.{end}](%0) : edge[{width}]\n"
        f"%2 = input[a]() : etype[{width}]\n%3 = gather[edge.etype](%2) : edge[{width}]\n"
        f"%4 = mul(%1, %3) : edge[{width}]\n%5 = {value.replace('%1', '%4')}\n"
        f"%6 = sum[edge.dst](%5) : dst[{row}]\nreturn %6\n"
    )
    program, pair = parse(text), f"{end}_pair"
    moved = compact(program)
    assert [op.type.domain for op in moved.ops if op.kind == kind] == [pair]
    for ratio in (r for r in (0.1, limit - 0.03, limit + 0.03, 1.0) if r <= 1):
        rows = {"edge": 10_000, pair: int(ratio * 10_000)}
        place = pair if ratio < limit else "edge"
        for found in (compact(program, rows), spread(moved, rows)):
            domains = [op.type.domain for op in found.ops if op.kind == kind]
            assert domains[-1] == place, ratio
        assert (spread(moved, rows) == moved) == (place == pair)


def test_blocks_of_about_one_size_share_what_was_compiled(monkeypatch):
    """Ratios differ from batch to batch; decisions are made for rounded rows."""
    made = []
    compiled = plans.Compiled
    monkeypatch.setattr(plans, "_COMPILED", {})
    monkeypatch.setattr(plans, "Compiled", lambda *a: made.append(compiled(*a)) or made[-1])
    ratios = [few / 32 for few in range(16, 33)]
    for ratio in ratios:
        two_scores(graph_of(ratio, ratio), *arguments())
    assert len(made) == 3  # at 0.5, 0.71 and 1 pairs per edge
    assert len({render(one.forward) for one in made}) == 2
