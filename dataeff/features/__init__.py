"""Features in host memory or on disk, delivered where the index lives.

`FeatureTable` is the public face; `gather` and `scatter_` are the operations under it.
"""

from dataeff.features.conversion import convert
from dataeff.features.embedding import HostEmbedding
from dataeff.features.gather import gather, gather_reference, scatter_, scatter_reference
from dataeff.features.hot import HotRows
from dataeff.features.hot_cost import HotSuggestion
from dataeff.features.loader import FeatureLoader
from dataeff.features.prefetch import Prefetch
from dataeff.features.quantised import dequantise, quantise, quantise_reference
from dataeff.features.stats import TableStats
from dataeff.features.table import FeatureTable
from dataeff.features.unified_tensor import UnifiedTensor, unified

__all__ = [
    "FeatureLoader",
    "FeatureTable",
    "HostEmbedding",
    "HotRows",
    "HotSuggestion",
    "Prefetch",
    "TableStats",
    "UnifiedTensor",
    "convert",
    "dequantise",
    "gather",
    "gather_reference",
    "quantise",
    "quantise_reference",
    "scatter_",
    "scatter_reference",
    "unified",
]
