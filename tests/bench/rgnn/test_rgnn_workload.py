from contextlib import nullcontext
from functools import partial

import pytest
import torch
from pretended_gpu import GPU, PretendedGpu

import dataeff.rgnn.indexed
import dataeff.rgnn.structure
from dataeff.bench import Options, Unavailable, rgnn
from dataeff.bench.rgnn import datasets, handwritten, ours, peers, typed, workload
from dataeff.bench.rgnn.workload import peak_host_bytes, require_memory

# The library's own warnings are its own: it calls torch.jit.script, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("default")
SMALL = rgnn.Size(
    "small", 60, 400, 5, partial(datasets.generate, datasets.Statistics("small", 60, 400, 2, 5))
)


@pytest.fixture(autouse=True)
def _no_haste(monkeypatch):
    """What is compared here is results: a machine with other work may take its time."""
    monkeypatch.setattr(rgnn, "SHORT_LIMIT_S", 300)


MODELS = ["RGCNConv", "RGATConv", "HGTConv", "GatedConv"]


def results_of(case, providers):
    torch.manual_seed(0)
    inputs, results = case.inputs(), {}
    for provider in providers:
        try:
            step = provider.prepare(inputs)
            results[provider.name] = step.call()
            assert step.metrics is None or "peak_over_tensors" in step.metrics()
        except Unavailable as reason:
            assert provider.name == "DGL RelGraphConv", reason
    return results


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_all_providers_compute_the_same(model, training):
    case = rgnn._case(Options(quick=True), model, SMALL, 16, training=training)
    results = results_of(case, case.providers)
    assert "dataeff" in results and len(results) >= (2 if model == "GatedConv" else 3)
    for result in results.values():
        torch.testing.assert_close(result, next(iter(results.values())), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_peers_compute_the_same_on_a_gpu(model, training, monkeypatch):
    ours._kept.clear()  # graphs of the host
    with PretendedGpu(monkeypatch) as gpu:
        options = Options(quick=True, device=torch.device("cuda"))
        case = rgnn._case(options, model, SMALL, 16, training=training)
        results = results_of(case, [p for p in case.providers if p.role == "peer"])
        assert ours._built(case.inputs()).device == GPU
        for result in results.values():
            for value in result.values() if training else [result]:
                assert gpu.place(value) == GPU
    for result in results.values():
        torch.testing.assert_close(result, next(iter(results.values())), rtol=1e-4, atol=1e-6)


def test_sums_agree_by_their_largest_element():
    case = rgnn._case(Options(quick=True), "RGATConv", SMALL, 16, training=True)
    y, k = torch.ones(3), torch.tensor([20.0, 0.01])
    case.assert_same({"y": y, "k": k}, {"y": y, "k": k + 1e-3})
    case.assert_same({"y": y, "k": k}, {"y": y, "k": k + torch.tensor([0.0, 0.03])})  # a kink
    for wrong in ({"y": y + 3e-3, "k": k}, {"y": y, "k": k + torch.tensor([0.0, 0.06])}):
        with pytest.raises(AssertionError, match=r"^[yk]: "):
            case.assert_same({"y": y, "k": k}, wrong)
    with pytest.raises(AssertionError, match="instead of"):
        case.assert_same({"y": y, "k": k}, {"y": y})
    with pytest.raises(AssertionError):
        case.assert_same(y, y * float("nan"))


@pytest.mark.parametrize(
    ("num_off", "by", "agree"), [(20, 5e-3, True), (40, 5e-3, False), (20, 2e-2, False)]
)
def test_few_elements_may_be_off_by_a_kink(num_off, by, agree):
    case = rgnn._case(Options(quick=True), "RGATConv", SMALL, 16, training=True)
    expected = torch.full((3 * 10**5,), 0.1)
    actual = expected.clone()
    actual[:num_off] += by
    with nullcontext() if agree else pytest.raises(AssertionError, match="x: "):
        case.assert_same({"x": expected}, {"x": actual})


def test_figures_of_ours_are_counted():
    case = rgnn._case(Options(quick=True), "RGCNConv", SMALL, 16, training=True)
    step = ours.kept(case.inputs())
    metrics = step.metrics()
    assert metrics["index_bytes"][0] > 400 * 4 and metrics["index_build_s"][0] > 0
    assert 0 < metrics["src_pair_ratio"][0] <= 1 and 0 < metrics["dst_pair_ratio"][0] <= 1
    assert metrics["peak_over_tensors"][0] > 0.5
    assert step.nbytes > 60 * 16 * 4 and step.flops > 2 * 60 * 16 * 16


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        a = torch.ones(1000, 1000)
        del a
        b = torch.ones(500, 1000)
        c = b + 1
        return b, c

    assert 4_000_000 <= peak_host_bytes(call) < 4_000_100  # the 1 that is added is a tensor too


def test_what_memory_does_not_hold_is_declined_with_both_numbers(monkeypatch):
    monkeypatch.setattr(workload, "available_bytes", lambda device=None: 10**9)
    require_memory(7 * 10**8, "it takes")
    with pytest.raises(Unavailable, match=r"it takes 0.9 GB, and 1.0 GB are free"):
        require_memory(9 * 10**8, "it takes")
    big = rgnn.Size("big", 10**6, 10**7, 5, lambda: pytest.fail("must not be made"))
    case = rgnn._case(Options(quick=True), "RGCNConv", big, 64, training=True)
    inputs = case.inputs()
    for provider in case.providers:
        if provider.name.startswith("dataeff"):
            with pytest.raises(Unavailable, match="features and edges"):
                provider.prepare(inputs)


def test_a_weight_per_edge_is_not_attempted_without_memory(monkeypatch):
    pytest.importorskip("torch_geometric")
    work = rgnn._case(Options(quick=True), "RGCNConv", SMALL, 16, training=True).inputs()
    monkeypatch.setattr(workload, "available_bytes", lambda device=None: 1000)
    with pytest.raises(Unavailable, match="a weight per edge would take"):
        peers.pyg("FastRGCNConv", work)


def test_pairs_are_unique_and_sorted_by_relation():
    work = rgnn._case(Options(quick=True), "RGCNConv", SMALL, 16, training=False).inputs()
    (src, _), relation = work.edges.edge_index, work.edges.edge_type
    pairs = handwritten.Pairs(src, relation, 60, 5)
    assert torch.equal(pairs.node[pairs.of_edge], src)
    assert torch.equal(pairs.relation[pairs.of_edge], relation)
    assert pairs.node.numel() == len({*zip(src.tolist(), relation.tolist(), strict=True)})


def test_what_a_graph_is_prepared_for_is_kept_until_the_next():
    case = rgnn._case(Options(quick=True), "RGCNConv", SMALL, 16, training=False)
    one, two = case.inputs(), case.inputs()
    assert ours._graph(one) is ours._graph(one)
    assert ours._graph(one) is not ours._graph(two)
    same = handwritten._prepared(one.edges, 60, 5)
    assert handwritten._prepared(one.edges, 60, 5) is same
    assert handwritten._prepared(two.edges, 60, 5) is not same


def test_a_new_graph_is_made_in_every_step(monkeypatch):
    case = rgnn._case(Options(quick=True), "RGCNConv", SMALL, 16, training=True)
    step = ours.new_graph(case.inputs())
    made = []
    structure = dataeff.rgnn.structure.Structure
    monkeypatch.setattr(
        dataeff.rgnn.indexed,
        "Structure",
        lambda *args, **how: made.append(1) or structure(*args, **how),
    )
    step.call()
    step.call()
    assert len(made) == 2


def test_edges_by_type_count_nodes_within_their_type():
    work = rgnn._case(Options(quick=True), "HGTConv", SMALL, 16, training=False).inputs()
    first = dict(zip(("n0", "n1"), work.edges.type_ptr.tolist(), strict=False))
    by_type = typed.edge_index_dict(work.edges, work.relations)
    assert len(by_type) == 5
    for relation, ((source, _, target), index) in enumerate(by_type.items()):
        mine = work.edges.edge_index[:, work.edges.edge_type == relation]
        assert torch.equal(index[0] + first[source], mine[0])
        assert torch.equal(index[1] + first[target], mine[1])
