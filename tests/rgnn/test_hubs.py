"""Rows of so many that they are shared out to many programs, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rgnn_layers import STATICS, built_as_on_a_gpu, graphs, tensors, typed_graph
from test_backends import LAYERS

from dataeff import rgnn
from dataeff.rgnn import structure
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.interpret import interpret
from dataeff.rgnn.long_rows import cut_hubs
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.view import View

# Long rows and hubs at sizes that an interpreter takes. Of small blocks a hub has more pieces than
# a program adds up at a time; at last every long row is a hub.
SMALL = Choice(long_row=2, hub=4)
MANY_BLOCKS = Choice(long_row=1, hub=2, block_elements=8, long_stages=2)
ALL_HUBS = Choice(long_row=4, hub=4)


def degrees(*wanted, relations=3):
    """A graph whose node k has so many edges from others, and as many to others."""
    dst = torch.repeat_interleave(torch.arange(len(wanted)), torch.tensor(wanted))
    src = dst[torch.randperm(len(dst), generator=torch.Generator().manual_seed(3))]
    return torch.stack([src, dst]), torch.arange(len(dst)) % relations, len(wanted), relations


BOUNDS = degrees(3, 4, 5, 0, 8, 9, 2, 12)
CASES = {
    "about the bounds": (BOUNDS, SMALL),
    "more pieces than a block": (degrees(9, 2, 0, 5), MANY_BLOCKS),
    "all long rows are hubs": (BOUNDS, ALL_HUBS),
}


def compare(program, view, named, dtype, tolerance, choice):
    pytest.importorskip("triton")
    want = interpret(program, view, named)
    got = Runner(program, dtype, "cpu", "triton", choice)(view, named)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    return want


def check(layer, case, choice, dtype=torch.float32, tolerance=2e-5, **arguments):
    """Forward and backward programs on generated Triton and on the interpreter of the IR."""
    _, etype, nodes, relations = case
    graph = typed_graph(case)
    named = arguments or tensors(layer, nodes, etype.numel(), relations, dtype)
    plan = layer.plan(graph, **named, **STATICS.get(layer, {}))
    view, compiled = View(graph, plan.sizes), plan.compiled
    values = compare(compiled.forward, view, named, dtype, tolerance, choice)
    outputs, saved = values[: compiled.num_outputs], values[compiled.num_outputs :]
    named |= {f"grad:{k}": torch.randn_like(v) for k, v in enumerate(outputs)}
    named |= {f"output:{k}": v for k, v in enumerate(outputs)}
    named |= {f"saved:{k}": v for k, v in enumerate(saved)}
    compare(compiled.backward, view, named, dtype, 10 * tolerance, choice)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda f: f.name)
def test_layers_on_hubs(layer):
    check(layer, *CASES["about the bounds"])


@pytest.mark.parametrize("layer", LAYERS[::3], ids=lambda f: f.name)
def test_layers_on_hubs_of_many_pieces(layer):
    check(layer, *CASES["more pieces than a block"])


@rgnn.layer
def reductions(g, x, s):
    """Every reduction over the edges of a node, two heads, and attention that is returned."""
    z = rgnn.reshape(g.src(x), 2, 3)
    alpha = rgnn.edge_softmax(g.edge(s))
    return g.sum(z), g.mean(z), g.max(z), g.sum(alpha * z), g.max(alpha), alpha


def arguments(case, dtype=torch.float32, scale=1.0):
    return {
        "x": torch.randn(case[2], 6, dtype=dtype),
        "s": scale * torch.randn(case[1].numel(), 2, dtype=dtype),
    }


@pytest.mark.parametrize("name", CASES)
def test_every_reduction(name):
    case, choice = CASES[name]
    single = choice == MANY_BLOCKS
    dtype, tolerance = (torch.float32, 2e-5) if single else (torch.float64, 1e-10)
    check(reductions, case, choice, dtype, tolerance, **arguments(case, dtype))


def test_ids_of_64_bits(monkeypatch):
    monkeypatch.setattr(structure, "MOST_IN_INT32", 0)
    case, choice = CASES["about the bounds"]
    assert typed_graph(case).structure.hubs("edge.dst", choice.hub).rows.dtype == torch.int64
    check(reductions, case, choice, **arguments(case))


@given(
    wanted=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    bounds=st.tuples(st.integers(0, 4), st.integers(1, 6)),
)
@settings(max_examples=5, deadline=None)
def test_any_degrees_and_bounds(wanted, bounds):
    case = degrees(*wanted)
    check(reductions, case, Choice(long_row=bounds[0], hub=bounds[1]), **arguments(case))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_softmax_of_large_scores(scale):
    """Each piece has a maximum of its own, thousands from that of others."""
    case = degrees(30, 5, 4)
    named = arguments(case)
    named["s"] = scale * torch.linspace(-1, 1, 39)[:, None].expand(39, 2).contiguous()
    check(reductions, case, SMALL, **named)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "s"])
def test_what_is_no_number_stays_so(wrong, where):
    """In one piece, in a whole piece, in a whole hub; another hub stays as it is."""
    src = torch.arange(76)
    case = torch.stack([src, src // 20]), torch.zeros(76, dtype=torch.long), 76, 1
    named = arguments(case)
    named[where][[3, *range(24, 28), *range(40, 60)]] = wrong
    graph = typed_graph(case)
    plan = reductions.plan(graph, **named)
    values = compare(
        *(plan.compiled.forward, View(graph, plan.sizes), named, torch.float32, 2e-5),
        SMALL,
    )
    assert not any(values[0][hub].isfinite().all() for hub in range(3)) or where == "s"
    assert all(v[3].isfinite().all() for v in values[:5])


@given(graphs(), st.integers(1, 9), st.booleans())
@settings(max_examples=50, deadline=None)
def test_pieces_cover_every_hub_once(case, hub, on_gpu):
    edge_index, etype, nodes, relations = case
    graph = rgnn.Graph(edge_index, etype, num_nodes=nodes, num_relations=relations)
    if on_gpu:
        with built_as_on_a_gpu():
            graph.prepare()
    degree = torch.bincount(edge_index[1], minlength=nodes)
    pieces = graph.structure.hubs("edge.dst", hub)
    if pieces is None:
        assert degree.max() <= hub
        return
    assert pieces.rows.dtype == pieces.first.dtype == torch.int32
    want = [
        (row, first)
        for row, first in zip(range(nodes), firsts(degree.tolist(), hub), strict=True)
        for _ in range(-(-int(degree[row]) // hub) if degree[row] > hub else 0)
    ]
    found = list(zip(pieces.rows.tolist(), pieces.first.tolist(), strict=True))
    assert found[: len(want)] == want
    assert all(row == -1 for row, _ in found[len(want) :])
    assert graph.nbytes >= 8 * len(found)


def firsts(degrees, hub):
    """The number of pieces before each row."""
    count = 0
    for degree in degrees:
        yield count
        count += -(-degree // hub) if degree > hub else 0


def test_there_is_room_for_as_many_pieces_as_there_can_be():
    """Shapes alone say how many: hubs of one row more than a piece take the most."""
    for counts in ([9] * 4, [9, 9, 9, 8], [36], [17, 19], [9, 27]):
        counts = torch.tensor(counts)
        pieces = cut_hubs(counts, 8, int(counts.sum()))
        used = sum(-(-n // 8) for n in counts.tolist() if n > 8)
        assert (pieces.rows >= 0).sum() == used <= pieces.rows.numel()
        assert 8 * pieces.rows.numel() <= 2 * counts.sum()  # so their sums take little memory


def test_long_rows_and_hubs_share_no_row():
    built = typed_graph(BOUNDS).structure
    long = built.long_rows("edge.dst", 3, 8)
    assert long.rows[: long.count].tolist() == [1, 2, 4]  # degrees 4, 5 and 8
    assert built.hubs("edge.dst", 8).rows.unique().tolist() == [-1, 5, 7]
    assert built.hubs("edge.dst", 12) is None and built.hubs("edge.dst", 11) is not None
