"""Nothing that a graph keeps is made while a CUDA graph is captured."""

import pytest
import torch
from rgnn_layers import rgat, tensors, typed_graph
from test_awkward_graphs import CASES

from dataeff import rgnn
from dataeff.rgnn.structure import Structure
from dataeff.rgnn.tilemap import TileMaps
from dataeff.rgnn.view import View

CUDA = torch.device("cuda", 1)


class OnCuda:
    """An object whose device is said to be a GPU; all else is the object's own."""

    def __init__(self, given):
        self.given = given
        self.device = CUDA

    def __getattr__(self, name):
        return getattr(self.given, name)


@pytest.fixture
def capturing(monkeypatch):
    """Whether the current stream is being captured, as torch is made to say."""
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    return state


def test_lazily_built_structures_are_refused_and_built_ones_are_found(capturing):
    graph = typed_graph(CASES["one relation, isolated nodes"])
    structure = Structure(graph)
    structure.graph = OnCuda(graph)
    getters = [
        lambda: structure.index("node.ntype"),
        lambda: structure.segments("node.ntype"),
        lambda: structure.index("edge.etype"),
        lambda: structure.segments("edge.src"),
        lambda: structure.long_rows("edge.src", 1, 9),
        lambda: structure.hubs("edge.src", 1),
        lambda: structure.typed_rows(("node", 9, "one", 1), lambda: "rows"),
    ]
    for get in getters:
        capturing[0] = True
        with pytest.raises(RuntimeError, match=r"inside a CUDA graph capture: run the layer once"):
            get()
        capturing[0] = False
        kept = get()
        assert kept is not None
        capturing[0] = True
        assert get() is kept


def test_what_a_capture_has_read_stays(capturing):
    """Its replays read the memory: no other layer's call may let it go."""
    case = CASES["one relation, isolated nodes"]
    structure = Structure(typed_graph(case))
    structure.graph = OnCuda(structure.graph)
    capturing[0] = True
    read = structure.index("edge.src_pair")
    capturing[0] = False
    structure.index("edge.src")
    assert structure.index("edge.src_pair") is read


def test_a_graph_that_was_never_used_is_refused(capturing, small):
    capturing[0] = True
    with pytest.raises(RuntimeError, match="the sorted edges of a graph would be built inside"):
        Structure(OnCuda(small))
    assert small.prepare().num_src_pairs > 0  # on a CPU nothing is captured


def test_tile_maps_and_ends_of_relations(capturing):
    maps = TileMaps(torch.tensor([0, 40, 41]), 41)
    kept = maps.of_block(16)
    maps.seg_ptr = OnCuda(maps.seg_ptr)
    graph = rgnn.Graph.from_typed({("a", "to", "b"): torch.tensor([[0], [1]])}, {"a": 1, "b": 2})
    graph.device = CUDA
    capturing[0] = True
    assert maps.of_block(16) is kept
    with pytest.raises(RuntimeError, match="the map of tiles of 32 rows"):
        maps.of_block(32)
    with pytest.raises(RuntimeError, match="the node types of relations"):
        _ = graph.relation_ends


def test_one_call_is_all_the_warm_up_that_forward_and_backward_need(monkeypatch):
    """After it, another step builds nothing that is kept."""
    from dataeff.kernels import interpreter, typed_gemm

    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "triton")
    built = []
    for module in ("structure", "tilemap", "indexed"):
        monkeypatch.setattr(
            f"dataeff.rgnn.{module}.refuse_capture", lambda device, what: built.append(what)
        )
    case = CASES["one relation, isolated nodes"]
    graph = typed_graph(case)
    named = tensors(rgat, case[2], case[1].numel(), case[3], torch.float32, 16, 16)
    plan = rgat.plan(graph, **named)
    counts = []
    with interpreter.interpreted(typed_gemm):
        for _ in range(2):
            view, inputs = View(graph, plan.sizes), list(named.values())
            outputs, saved = plan.run_forward(view, inputs)
            plan.run_backward(view, outputs, inputs, outputs, saved)
            counts.append(len(built))
    assert counts[0] == counts[1] > 5
