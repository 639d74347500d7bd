"""Graphs with the published statistics of the datasets that relational GNNs are measured on.

The datasets themselves are downloads; here are random graphs with their numbers of nodes, edges,
node types and relations, seeded. Relation sizes and degrees follow power laws, each relation leads
from one node type to another and touches a part of their nodes, and where the source counts every
triple in both directions half of the relations are the other half reversed.

Sources of the statistics:
    aifb, mutag, bgs, am: PyTorch Geometric's `Entities`, edges with their inverses
        (pytorch-geometric.readthedocs.io, the table of datasets); node types as in DGL's
        documentation of AIFBDataset, MUTAGDataset, BGSDataset and AMDataset.
    fb15k-237: Toutanova and Chen, CVSC 2015: 272,115 training triples, with inverses.
    biokg, mag, wikikg2: Open Graph Benchmark, arXiv 2005.00687, tables 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Exponent of the k-th most frequent relation's odds, 1 / k^s, and of the skew of degrees.
RELATION_SKEW = 1.0
DEGREE_SKEW = 2.0


@dataclass(frozen=True)
class Statistics:
    """Numbers of nodes, edges, node types and relations; `inverse`: edges count both ways."""

    name: str
    nodes: int
    edges: int
    node_types: int
    relations: int
    inverse: bool = False


DATASETS = (
    Statistics("aifb", 8_285, 58_086, 7, 90, inverse=True),
    Statistics("mutag", 23_644, 148_454, 5, 46, inverse=True),
    Statistics("fb15k-237", 14_541, 544_230, 1, 474, inverse=True),
    Statistics("bgs", 333_845, 1_832_398, 27, 206, inverse=True),
    Statistics("biokg", 93_773, 5_088_434, 5, 51),
    Statistics("am", 1_666_764, 11_976_642, 7, 266, inverse=True),
    Statistics("wikikg2", 2_500_604, 17_137_181, 1, 535),
    Statistics("mag", 1_939_743, 21_111_007, 4, 4),
)


@dataclass(frozen=True, eq=False)
class Edges:
    """A generated graph; one is equal to itself alone, so that what is made of it can be kept.

    Attributes:
        edge_index: sources and destinations, [2, edges], int64.
        edge_type: relation of each edge, [edges], int64.
        type_ptr: nodes `type_ptr[t]:type_ptr[t + 1]` have the type t, [node types + 1].
    """

    edge_index: Tensor
    edge_type: Tensor
    type_ptr: Tensor

    def to(self, device: torch.device) -> Edges:
        """The same graph on a device."""
        if self.edge_index.device.type == device.type:
            return self
        return Edges(self.edge_index.to(device), self.edge_type.to(device), self.type_ptr)


def generate(statistics: Statistics, seed: int = 0) -> Edges:
    """A random graph with these statistics; the same for a seed, on any machine with this torch."""
    g = torch.Generator().manual_seed(seed)
    relations = statistics.relations // 2 if statistics.inverse else statistics.relations
    edges = statistics.edges // 2 if statistics.inverse else statistics.edges
    type_ptr = _bounds(statistics.nodes, statistics.node_types)
    sizes = _sizes_by_power_law(edges, relations)
    edge_type = torch.arange(relations).repeat_interleave(sizes)
    src = _endpoints(edge_type, relations, type_ptr, g)
    dst = _endpoints(edge_type, relations, type_ptr, g)
    edge_index = torch.stack([src, dst])
    if statistics.inverse:
        edge_index = torch.cat([edge_index, edge_index.flip(0)], 1)
        edge_type = torch.cat([edge_type, edge_type + relations])
    order = torch.randperm(edge_type.numel(), generator=g)
    return Edges(edge_index[:, order], edge_type[order], type_ptr)


def uniform(nodes: int, edges: int, relations: int) -> Edges:
    """A graph of uniform ends and power-law relations, for growth in one number at a time."""
    g = torch.Generator().manual_seed(0)
    edge_index = torch.randint(nodes, (2, edges), generator=g)
    sizes = _sizes_by_power_law(edges, relations)
    edge_type = torch.arange(relations).repeat_interleave(sizes)
    order = torch.randperm(edges, generator=g)
    return Edges(edge_index, edge_type[order], torch.tensor([0, nodes]))


def _sizes_by_power_law(total: int, parts: int) -> Tensor:
    """Positive sizes that add up to `total`, the k-th proportional to 1 / k^s."""
    odds = torch.arange(1, parts + 1, dtype=torch.float64) ** -RELATION_SKEW
    sizes = (odds / odds.sum() * (total - parts)).long() + (1 if total >= parts else 0)
    sizes[0] += total - int(sizes.sum())
    return sizes


def _bounds(nodes: int, node_types: int) -> Tensor:
    sizes = _sizes_by_power_law(nodes, node_types)
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _endpoints(edge_type: Tensor, relations: int, type_ptr: Tensor, g: torch.Generator) -> Tensor:
    """One end of every edge: a skewed choice among the nodes that its relation touches there.

    A relation of E_r edges touches at most about E_r / 2 nodes of its type, those after a random
    one, and the density falls with the square root of the distance, so that hubs emerge.
    """
    node_type = torch.randint(type_ptr.numel() - 1, (relations,), generator=g)
    node_type[0] = 0  # the largest relation leads between nodes of the largest type
    available = type_ptr.diff()[node_type]
    touched = torch.minimum(available, edge_type.bincount(minlength=relations) // 2 + 1)
    start = (torch.rand(relations, generator=g, dtype=torch.float64) * available).long()
    skewed = torch.rand(edge_type.numel(), generator=g, dtype=torch.float64) ** DEGREE_SKEW
    offset = start[edge_type] + (skewed * touched[edge_type]).long()
    at = type_ptr[node_type][edge_type] + offset % available[edge_type]
    return _shuffled_within_types(type_ptr, g)[at]


def _shuffled_within_types(type_ptr: Tensor, g: torch.Generator) -> Tensor:
    """A random renaming of the nodes of each type: neighbours in number are no neighbours."""
    parts = pairwise(type_ptr.tolist())
    return torch.cat([begin + torch.randperm(end - begin, generator=g) for begin, end in parts])
