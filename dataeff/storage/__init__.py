"""Files: asynchronous, checked transfers, and spill files that leave nothing behind."""

from __future__ import annotations

from dataeff._core import Engine, FaultPlan, Stripe, StripedRead, Transfer
from dataeff.storage.bandwidth import Probe, filesystem_of, probe
from dataeff.storage.choice import Choice, choose_engine
from dataeff.storage.cufile import cufile_library, cufile_refusal
from dataeff.storage.engine import open_engine, uring_refusal
from dataeff.storage.spill import Extent, SpillFile
from dataeff.storage.striped import StripedSpill

__all__ = [
    "Choice",
    "Engine",
    "Extent",
    "FaultPlan",
    "Probe",
    "SpillFile",
    "Stripe",
    "StripedRead",
    "StripedSpill",
    "Transfer",
    "choose_engine",
    "cufile_library",
    "cufile_refusal",
    "filesystem_of",
    "open_engine",
    "probe",
    "uring_refusal",
]
