"""Files: asynchronous, checked transfers, and spill files that leave nothing behind."""

from __future__ import annotations

from dataeff._core import Engine, FaultPlan, Transfer
from dataeff.storage.engine import open_engine, uring_refusal
from dataeff.storage.spill import Extent, SpillFile

__all__ = ["Engine", "Extent", "FaultPlan", "SpillFile", "Transfer", "open_engine", "uring_refusal"]
