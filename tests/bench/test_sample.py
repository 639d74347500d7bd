"""The sampling benchmark's peers and its comparison, on small graphs."""

import dataclasses
from functools import partial

import pytest
import torch

from dataeff.bench import sample
from dataeff.bench.case import Options, Unavailable


def test_every_provider_that_is_here_samples_what_exists():
    case = next(iter(sample.cases(Options(quick=True))))
    inputs = sample.make_inputs(partial(sample.power_law_graph, 400, 4000), 10, (3, 2, 2))
    found = {}
    for provider in case.providers:
        try:
            found[provider.name] = provider.prepare(inputs).call()
        except Unavailable as reason:
            assert "installed" in str(reason) or "imported" in str(reason)
    assert {"plain torch", "dataeff", "dataeff 1 thread"} <= found.keys()
    for drawn in found.values():
        case.assert_same(found["plain torch"], drawn)


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
    monkeypatch.setattr(sample, "CSCGraph", lambda edges, num_nodes: torch.empty(0))
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
