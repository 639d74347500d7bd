"""PyTorch Geometric: its loaders, with dataeff's sampler and feature tables (`dataeff[pyg]`)."""

from dataeff.integrations.pyg.dataset import open_dataset, save_dataset
from dataeff.integrations.pyg.loader import LinkNeighborLoader, NeighborLoader
from dataeff.integrations.pyg.sampler import PyGNeighborSampler
from dataeff.integrations.pyg.stores import CSCGraphStore, TableFeatureStore

__all__ = [
    "CSCGraphStore",
    "LinkNeighborLoader",
    "NeighborLoader",
    "PyGNeighborSampler",
    "TableFeatureStore",
    "open_dataset",
    "save_dataset",
]
