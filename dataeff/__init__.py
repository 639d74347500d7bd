"""DataEff: GPU training that does not wait for bytes.

Three systems over one substrate of tiers (device, host, disk) and checked transfers:
feature gathering (`dataeff.FeatureTable`), a compiler for relational GNN layers (`dataeff.rgnn`,
`dataeff.nn`) and activation offloading (`dataeff.ActivationOffload`).

Importing it initialises no CUDA, starts no thread and writes no file; the systems are imported
when they are first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dataeff import _ops  # noqa: F401  (registers torch.ops.dataeff.*)
from dataeff._version import __version__

if TYPE_CHECKING:
    # each lazily imported name stands here once more, for type checkers and editors
    from dataeff import features as features
    from dataeff import nn as nn
    from dataeff import rgnn as rgnn
    from dataeff import sampling as sampling
    from dataeff.features import FeatureLoader as FeatureLoader
    from dataeff.features import FeatureTable as FeatureTable
    from dataeff.features import HostEmbedding as HostEmbedding
    from dataeff.features import HotRows as HotRows
    from dataeff.features import convert as convert
    from dataeff.features import unified as unified
    from dataeff.offload import ActivationOffload as ActivationOffload

# name -> the module it is imported from when it is first used
_LAZY: dict[str, str] = {
    "ActivationOffload": "dataeff.offload",
    "FeatureLoader": "dataeff.features",
    "FeatureTable": "dataeff.features",
    "HotRows": "dataeff.features",
    "convert": "dataeff.features",
    "HostEmbedding": "dataeff.features",
    "features": "dataeff.features",
    "nn": "dataeff.nn",
    "rgnn": "dataeff.rgnn",
    "sampling": "dataeff.sampling",
    "unified": "dataeff.features",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'dataeff' has no attribute {name!r}")
    value = importlib.import_module(module)
    return value if module.rpartition(".")[2] == name else getattr(value, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
