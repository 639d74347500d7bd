"""Neighbour sampling: small subgraphs around seed nodes of a graph that stays in host memory."""

from dataeff.sampling.csc import CSCGraph
from dataeff.sampling.hetero import HeteroNeighborSampler, HeteroSampledSubgraph
from dataeff.sampling.neighbor import NeighborSampler, SampledSubgraph

__all__ = [
    "CSCGraph",
    "HeteroNeighborSampler",
    "HeteroSampledSubgraph",
    "NeighborSampler",
    "SampledSubgraph",
]
