"""The sampling benchmark's peers and its comparison, on small graphs."""

import dataclasses
from functools import partial

import pytest
import torch

from dataeff.bench import sample
from dataeff.bench.case import Options, Unavailable


@pytest.mark.parametrize("weighted", [False, True])
def test_every_provider_that_is_here_samples_what_exists(weighted):
    case = list(sample.cases(Options(quick=True)))[weighted]
    assert case.size.startswith("weighted") == weighted
    graph = partial(sample.power_law_graph, 400, 4000, weighted)
    inputs = sample.make_inputs(graph, 10, (3, 2, 2))
    found = {}
    for provider in case.providers:
        try:
            found[provider.name] = provider.prepare(inputs).call()
        except Unavailable as reason:
            assert any(why in str(reason) for why in ("installed", "imported", "GPU", "by weight"))
    assert {"plain torch", "dataeff", "dataeff 1 thread"} <= found.keys()
    for drawn in found.values():
        case.assert_same(found["plain torch"], drawn)


def test_what_is_sampled_by_weight_follows_the_weights():
    """Of a column of two entries the heavier one, in the share of draws that its weight is."""
    share = 0.9
    colptr, row = torch.tensor([0, 2, 2, 2]), torch.tensor([1, 2])
    weight = torch.tensor([1 - share, share], dtype=torch.float64)
    graph = sample.CSCGraph.from_csc(colptr, row, edge_weight=weight)
    inputs = sample.Inputs(graph, [torch.tensor([0])] * sample.NUM_BATCHES, (1,))
    for provider in (sample._plain, sample._dgl, partial(sample._ours, num_threads=1)):
        try:
            call = provider(inputs).call
        except Unavailable:
            continue
        heavier = sum(2 in call()[1].n_id.tolist() for _ in range(600))
        assert abs(heavier / 600 - share) < 0.06  # five times the standard deviation


def test_a_sample_that_cannot_be_is_found_out():
    inputs = sample.make_inputs(partial(sample.power_law_graph, 400, 4000), 10, (3, 2))
    drawn = sample._ours(inputs, None).call()[1]
    wrong = (drawn.row + 1) % len(drawn.n_id)
    with pytest.raises(AssertionError):
        sample._assert_plausible((inputs, drawn), (inputs, dataclasses.replace(drawn, row=wrong)))
    fewer = dataclasses.replace(drawn, row=drawn.row[1:], col=drawn.col[1:])
    with pytest.raises(AssertionError):
        sample._assert_plausible((inputs, drawn), (inputs, fewer))


def test_the_cases_of_one_size_share_its_graph(monkeypatch):
    made = []
    monkeypatch.setattr(sample, "power_law_edges", lambda n, e: made.append(e) or torch.zeros(2, 1))
    monkeypatch.setattr(sample, "CSCGraph", lambda edges, **_: torch.empty(0))
    monkeypatch.setattr(sample, "Inputs", lambda graph, batches, fanouts: graph)
    cases = list(sample.cases(Options()))[:4]
    monkeypatch.setattr(sample, "NUM_BATCHES", 0)
    first, second, third, fourth = (case.inputs() for case in cases)
    assert first is second and third is fourth and first is not third
    assert made == [10**6, 10**7]


def test_ranks_follow_a_power_law():
    edges = sample.power_law_edges(1000, 50_000)
    degree = torch.bincount(edges[0], minlength=1000).sort(descending=True).values
    assert edges.min() >= 0 and edges.max() < 1000
    assert degree[0] > 20 * degree.float().mean() and degree[500] > 0
