"""Graphs that layers remember, where a captured CUDA graph reads them in every replay."""

import gc
import weakref

import pytest
import torch
from pretended_gpu import GPU, PretendedGpu

from dataeff import nn, rgnn
from dataeff.nn import graphs
from dataeff.nn.table_graph import table_graph_for

NODES, RELATIONS = 12, 3
KINDS = [("a", "to", "b"), ("b", "to", "a")]


@pytest.fixture
def capturing(monkeypatch):
    """Whether the current stream is being captured, on a GPU that is host memory."""
    state = [False]
    with PretendedGpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
        yield state


def edges():
    return (
        torch.randint(NODES, (2, 40), device="cuda"),
        torch.randint(RELATIONS, (40,), device="cuda"),
    )


def untyped(index, etype):
    return graphs.graph_for(index, etype, NODES, NODES, RELATIONS)


def typed(index, etype):
    x = {t: torch.empty(NODES, 4, device="cuda") for t in "ab"}
    return graphs.typed_graph_for({KINDS[0]: index, KINDS[1]: etype}, x, ["a", "b"], KINDS)


def table(index, etype):
    sizes = (NODES, RELATIONS, NODES, NODES)
    return table_graph_for(untyped(index, etype), None, None, *sizes)


CALLS = {
    "untyped": (untyped, edges),
    "typed": (typed, lambda: (edges()[0], edges()[0])),
    "node ids": (table, edges),
}


@pytest.mark.parametrize("name", CALLS)
def test_graphs_that_a_capture_reads_live_as_long_as_their_edges(capturing, name):
    call, make = CALLS[name]
    given = make()
    graph = weakref.ref(call(*given))
    assert graph().device == GPU
    capturing[0] = True
    assert call(*given) is graph()
    capturing[0] = False
    others = [make() for _ in range(graphs._KEPT + 1)]
    for other in others:
        call(*other)
    gc.collect()
    assert graph() is not None and call(*others[0]) is not graph()
    del given
    gc.collect()
    assert graph() is None


def test_written_edges_make_another_graph_and_the_captured_one_stays(capturing):
    with torch.inference_mode():  # whose writes are not counted
        given = edges()
        graph = weakref.ref(untyped(*given))
    found = graphs._captured
    capturing[0] = True
    assert untyped(*given) is graph()
    capturing[0] = False
    with torch.inference_mode():
        given[1].add_(1).remainder_(RELATIONS)
        assert untyped(*given) is not graph()
    gc.collect()
    assert graph() is not None and given[0] in found


def test_a_graph_that_a_capture_would_make_is_refused_and_not_remembered(capturing):
    index, etype = edges()
    graph = rgnn.Graph(index, etype, num_nodes=NODES, num_relations=RELATIONS)
    graphs._tables.clear()
    capturing[0] = True
    for call in (
        lambda: untyped(index, etype),
        lambda: nn.RGCNConv(NODES, 4, RELATIONS)(None, graph),
    ):
        with pytest.raises(RuntimeError, match="the graph of these edges would be built inside"):
            call()
    assert not graphs._tables
