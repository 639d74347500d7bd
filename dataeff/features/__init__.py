"""Features in host memory, delivered where the index lives.

`FeatureTable` is the public face; `gather` and `scatter_` are the operations under it.
"""

from dataeff.features.gather import gather, gather_reference, scatter_, scatter_reference
from dataeff.features.loader import FeatureLoader
from dataeff.features.prefetch import Prefetch
from dataeff.features.stats import TableStats
from dataeff.features.table import FeatureTable
from dataeff.features.unified_tensor import UnifiedTensor, unified

__all__ = [
    "FeatureLoader",
    "FeatureTable",
    "Prefetch",
    "TableStats",
    "UnifiedTensor",
    "gather",
    "gather_reference",
    "scatter_",
    "scatter_reference",
    "unified",
]
