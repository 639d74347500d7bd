"""DGL, where it can be imported beside this torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from dataeff.bench.case import Unavailable


def import_dgl() -> ModuleType | Any:
    """The module `dgl`, without its GraphBolt; raises Unavailable with the reason."""
    # GraphBolt needs its binary for exactly this torch, and nothing here uses it.
    sys.modules.setdefault("dgl.graphbolt", ModuleType("dgl.graphbolt"))
    try:
        return importlib.import_module("dgl")
    except (ImportError, OSError, AttributeError) as error:
        raise Unavailable(f"dgl cannot be imported: {error}") from error
