"""PyTorch Geometric: its loaders, with dataeff's sampler and feature tables (`dataeff[pyg]`)."""

try:
    import torch_geometric  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch_geometric":
        raise
    raise ModuleNotFoundError(
        "dataeff.integrations.pyg needs PyTorch Geometric: pip install 'dataeff[pyg]'",
        name=error.name,
    ) from None

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
