"""Scores of nodes against dense linear algebra and against what a sampler reads."""

import pytest
import torch

import dataeff
from dataeff.features import hotness
from dataeff.sampling import CSCGraph, NeighborSampler

N = 30


@pytest.fixture
def edges():
    torch.manual_seed(0)
    return torch.randint(N, (2, 200))


def transition(edges):
    """Row u: chances of the next node of a walk against the edges that is at u."""
    chances = torch.zeros(N, N, dtype=torch.float64)
    for source, target in edges.t().tolist():
        chances[target, source] += 1
    return chances / chances.sum(1, keepdim=True).clamp(min=1)


def solution(edges, start, damping):
    matrix = torch.eye(N, dtype=torch.float64) - damping * transition(edges).t()
    return torch.linalg.solve(matrix, (1 - damping) * start)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_degree_counts_edges_out(edges, dtype):
    score = hotness.degree(edges.to(dtype), N)
    assert score.tolist() == [float((edges[0] == v).sum()) for v in range(N)]


@pytest.mark.parametrize("damping", [0.0, 0.5, 0.85])
@pytest.mark.parametrize("piece", [7, 1 << 24])
def test_reverse_pagerank_solves_its_equation(edges, damping, piece, monkeypatch):
    monkeypatch.setattr(hotness, "EDGES_PER_PIECE", piece)
    start = torch.full((N,), 1 / N, dtype=torch.float64)
    score = hotness.reverse_pagerank(edges, N, damping=damping, num_steps=200)
    torch.testing.assert_close(score, solution(edges, start, damping))


@pytest.mark.parametrize("as_mask", [False, True])
def test_weighted_reverse_pagerank_begins_at_the_training_nodes(edges, as_mask):
    train = torch.tensor([3, 7, 20])
    start = torch.zeros(N, dtype=torch.float64)
    start[train] = 1 / 3
    nodes = start > 0 if as_mask else train
    score = hotness.weighted_reverse_pagerank(edges, N, nodes, num_steps=200)
    torch.testing.assert_close(score, solution(edges, start, 0.85))


def test_scores_predict_what_a_sampler_reads():
    torch.manual_seed(1)
    num_nodes, num_edges = 2000, 20_000
    popular = (torch.rand(num_edges) ** 3 * num_nodes).long()
    edges = torch.stack([popular, torch.randint(num_nodes, (num_edges,))])
    train = torch.randperm(num_nodes)[:200]
    sampler = NeighborSampler(CSCGraph(edges, num_nodes=num_nodes), [5, 5])
    batches = [sampler.sample(train[i : i + 50], seed=i).n_id for i in range(0, 200, 50)]
    counts = hotness.access_counts(batches, num_nodes)
    total = counts.sum()
    assert total == sum(len(batch) for batch in batches)
    best = counts.topk(200).values.sum() / total
    for score in (
        hotness.degree(edges, num_nodes),
        hotness.reverse_pagerank(edges, num_nodes),
        hotness.weighted_reverse_pagerank(edges, num_nodes, train),
    ):
        hits = counts[dataeff.HotRows(200, score).chosen(num_nodes)].sum() / total
        assert 0.1 * 2 < hits <= best  # twice what 10 % of the rows taken blindly would serve


def test_access_counts():
    batches = [torch.tensor([[0, 2], [-1, 2]]), torch.tensor([], dtype=torch.int32)]
    assert hotness.access_counts(batches, 4).tolist() == [1, 0, 2, 1]
    with pytest.raises(IndexError, match="holds 4"):
        hotness.access_counts([torch.tensor([4])], 4)
    with pytest.raises(TypeError, match=r"int64, not torch.float32: use \.long\(\)"):
        hotness.access_counts([torch.tensor([4.0])], 4)


def test_no_edges_and_no_nodes():
    none = torch.empty(2, 0, dtype=torch.long)
    assert hotness.degree(none, 3).tolist() == [0, 0, 0]
    assert hotness.reverse_pagerank(none, 0).shape == (0,)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda e: hotness.degree(e, N - 25), IndexError, "not in"),
        (lambda e: hotness.degree(e.float(), N), TypeError, "float32"),
        (lambda e: hotness.degree(e.numpy(), N), TypeError, "edge_index .* ndarray"),
        (lambda e: hotness.access_counts([[1, 2]], N), TypeError, "indices .* list"),
        (
            lambda e: hotness.weighted_reverse_pagerank(e, N, [1, 2]),
            TypeError,
            "train_nodes .* list",
        ),
        (lambda e: hotness.degree(e.t(), N), ValueError, r"\(200, 2\)"),
        (lambda e: hotness.reverse_pagerank(e, N, damping=1), ValueError, "got 1"),
        (lambda e: hotness.reverse_pagerank(e, N, num_steps=-1), ValueError, "num_steps=-1"),
        (lambda e: hotness.reverse_pagerank(e[:, :0], -3), ValueError, "num_nodes=-3"),
        (lambda e: hotness.degree(e, N + 0.5), TypeError, f"num_nodes={N}.5 is no integer"),
        (lambda e: hotness.access_counts([e], -3), ValueError, "num_rows=-3"),
        (
            lambda e: hotness.weighted_reverse_pagerank(e, N, torch.tensor([N])),
            IndexError,
            f"train_nodes holds {N}",
        ),
        (
            lambda e: hotness.weighted_reverse_pagerank(e, N, torch.zeros(N, dtype=torch.bool)),
            ValueError,
            "no training node",
        ),
        (
            lambda e: hotness.weighted_reverse_pagerank(e, N, torch.ones(3, dtype=torch.bool)),
            ValueError,
            "mask",
        ),
    ],
)
def test_bad_input_is_named(edges, call, error, words):
    with pytest.raises(error, match=words):
        call(edges)
