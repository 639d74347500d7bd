"""How hot the rows of a graph's nodes are: scores for `HotRows`.

A sampler that starts at training nodes and walks against the edges reads the features of the nodes
it meets; a score estimates how often it meets each. All but `access_counts` are from Data Tiering
(Min et al., KDD 2022, section 3.2), which finds that structure alone predicts accesses well.

Every function takes `edge_index`, [2, num_edges], sources and targets, int32 or int64, in host
memory (messages go from source to target, so a target's sampled neighbours are sources), and gives
[num_nodes], float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dataeff._integers import check_id_dtype, checked_int

EDGES_PER_PIECE = 1 << 24


def degree(edge_index: Tensor, num_nodes: int) -> Tensor:
    """`score[v]` = number of edges that leave v: how many nodes may ask for its features.

    Raises:
        IndexError: an edge names a node that is not in [0, num_nodes).
        TypeError: ids are no tensor, or neither int32 nor int64; a number that is no integer.
        ValueError: a wrong shape or device, or a negative number.
    """
    num_nodes = checked_int("num_nodes", num_nodes, least=0)
    source, _ = _edges(edge_index, num_nodes)
    return torch.bincount(source, minlength=num_nodes).double()


def reverse_pagerank(
    edge_index: Tensor, num_nodes: int, *, damping: float = 0.85, num_steps: int = 20
) -> Tensor:
    """PageRank on the reversed graph: where a walk against the edges spends its time.

        score[v] = (1 - d) / N + d * sum over edges v -> u of score[u] / indegree(u)

    A walker at u moves to one of its in-neighbours with equal chances, as a sampler does.

    Args:
        edge_index: [2, num_edges].
        num_nodes: N.
        damping: d, the chance of another step.
        num_steps: iterations; the error shrinks by d with each.

    Raises:
        IndexError, TypeError, ValueError: as in `degree`; or a damping outside [0, 1).
    """
    num_nodes = checked_int("num_nodes", num_nodes, least=0)
    start = torch.full((num_nodes,), 1 / max(num_nodes, 1), dtype=torch.float64, device="cpu")
    return _walk(edge_index, start, damping, num_steps)


def weighted_reverse_pagerank(
    edge_index: Tensor,
    num_nodes: int,
    train_nodes: Tensor,
    *,
    damping: float = 0.85,
    num_steps: int = 20,
) -> Tensor:
    """Reverse PageRank whose walks begin at the training nodes, as the sampler's do.

        score[v] = (1 - d) w[v] + d * sum over edges v -> u of score[u] / indegree(u)

    with w[v] = 1 / number of training nodes for these, 0 for all others.

    Args:
        edge_index: [2, num_edges].
        num_nodes: N.
        train_nodes: row numbers, int32 or int64, or a bool mask [num_nodes].
        damping: d, the chance of another step.
        num_steps: iterations.

    Raises:
        IndexError, TypeError, ValueError: as in `degree`; no training node; a damping outside
            [0, 1).
    """
    num_nodes = checked_int("num_nodes", num_nodes, least=0)
    _check_tensor(train_nodes, "train_nodes")
    if train_nodes.dtype == torch.bool:
        if train_nodes.shape != (num_nodes,):
            raise ValueError(f"the mask is {tuple(train_nodes.shape)}, not ({num_nodes},)")
        train_nodes = train_nodes.nonzero().view(-1)
    if not train_nodes.numel():
        raise ValueError("there is no training node to walk from")
    _check_ids(train_nodes, num_nodes, "train_nodes")
    start = torch.zeros(num_nodes, dtype=torch.float64, device="cpu")
    start[train_nodes.long()] = 1
    return _walk(edge_index, start / start.sum(), damping, num_steps)


def access_counts(indices: Iterable[Tensor], num_rows: int) -> Tensor:
    """Counts how often each row is asked for in sampled batches (`n_id` of an epoch, say).

    Args:
        indices: row numbers of each batch, int32 or int64, any shape and device.
        num_rows: rows of the table; negative numbers count from its end.

    Raises:
        IndexError: a number is out of range.
        TypeError: numbers are no tensor, or neither int32 nor int64; `num_rows` is no integer.
        ValueError: `num_rows` is negative.
    """
    num_rows = checked_int("num_rows", num_rows, least=0)
    counts = torch.zeros(num_rows, dtype=torch.int64, device="cpu")
    for index in indices:
        _check_tensor(index, "each of the indices")
        ids = index.detach().reshape(-1).cpu()
        _check_ids(ids, num_rows, "indices", low=-num_rows)
        if ids.numel():
            counts += torch.bincount(ids.long() % num_rows, minlength=num_rows)
    return counts.double()


def _walk(edge_index: Tensor, start: Tensor, damping: float, num_steps: int) -> Tensor:
    if not 0 <= damping < 1:
        raise ValueError(f"damping must be in [0, 1), got {damping}")
    num_steps = checked_int("num_steps", num_steps, least=0)
    source, target = _edges(edge_index, len(start))
    indegree = torch.bincount(target, minlength=len(start)).clamp_(min=1).double()
    score = start
    for _ in range(num_steps):
        passed = score / indegree
        reached = torch.zeros_like(score)
        for piece in range(0, len(source), EDGES_PER_PIECE):  # bounds the values held at once
            edges = slice(piece, piece + EDGES_PER_PIECE)
            reached.index_add_(0, source[edges], passed[target[edges]])
        score = (1 - damping) * start + damping * reached
    return score


def _edges(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    _check_tensor(edge_index, "edge_index")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must be [2, num_edges], got {tuple(edge_index.shape)}")
    if edge_index.device.type != "cpu":
        raise ValueError(f"edge_index must be in host memory, not on {edge_index.device}: .cpu()")
    _check_ids(edge_index, num_nodes, "edge_index")
    return edge_index[0], edge_index[1]


def _check_tensor(ids: Tensor, name: str) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"{name} must be a tensor, not a {type(ids).__name__}: torch.as_tensor(...)"
        )


def _check_ids(ids: Tensor, num_rows: int, name: str, low: int = 0) -> None:
    check_id_dtype(name, ids)
    if not ids.numel():
        return
    smallest, largest = (int(value) for value in ids.aminmax())
    if smallest < low or largest >= num_rows:
        wrong = smallest if smallest < low else largest
        raise IndexError(f"{name} holds {wrong}, which is not in [{low}, {num_rows})")
