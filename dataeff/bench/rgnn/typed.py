"""The same graph as layers for several node types take it: dictionaries by type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from dataeff.bench.rgnn.datasets import Edges
from dataeff.bench.rgnn.workload import Workload

EdgeType = tuple[str, str, str]


@lru_cache(maxsize=1)  # of the cases that follow one another
def metadata(edges: Edges, relations: int) -> tuple[list[str], list[EdgeType]]:
    """Node types, and (source type, relation, destination type) of each relation."""
    names = [f"n{t}" for t in range(edges.type_ptr.numel() - 1)]
    kind = edges.edge_type
    one_edge = torch.zeros(relations, dtype=torch.long, device=kind.device)
    one_edge[kind] = torch.arange(kind.numel(), device=kind.device)
    ends = torch.bucketize(edges.edge_index[:, one_edge].cpu(), edges.type_ptr[1:], right=True)
    pairs = ends.t().tolist()
    return names, [(names[s], f"r{r}", names[d]) for r, (s, d) in enumerate(pairs)]


@lru_cache(maxsize=1)
def edge_index_dict(edges: Edges, relations: int) -> dict[EdgeType, Tensor]:
    """Edges by relation, nodes counted within their type."""
    names, edge_types = metadata(edges, relations)
    first = dict(zip(names, edges.type_ptr.tolist(), strict=False))
    order = torch.argsort(edges.edge_type, stable=True)
    counts = edges.edge_type.bincount(minlength=relations).tolist()
    parts = edges.edge_index[:, order].split(counts, dim=1)
    offsets = [torch.tensor([[first[s]], [first[d]]]) for s, _, d in edge_types]
    return {
        key: part - offset.to(part.device)
        for key, part, offset in zip(edge_types, parts, offsets, strict=True)
    }


def forward(
    conv: Callable[..., Mapping[str, Tensor | None]], edges: object, work: Workload
) -> Callable[[Tensor], Tensor]:
    """A layer of dictionaries as a function of all features, [N, D], to those of all targets."""
    names, _ = metadata(work.edges, work.relations)
    sizes = work.edges.type_ptr.diff().tolist()

    def call(x: Tensor) -> Tensor:
        found = conv(dict(zip(names, x.split(sizes), strict=True)), edges)
        given = [found.get(name) for name in names]
        return torch.cat([rows for rows in given if rows is not None])

    return call
