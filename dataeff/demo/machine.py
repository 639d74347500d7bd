"""On what the demo ran: figures mean nothing without it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from dataeff._version import __version__
from dataeff.bench.record import processor_name


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The processor, its usable cores, memory, and the GPU when one is used."""
    machine: dict[str, Any] = {
        "system": platform.platform(terse=True),
        "processor": processor_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return machine


def describe_versions() -> dict[str, str]:
    """Versions of what was used."""
    versions = {"dataeff": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "matplotlib"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions
