"""The NUMA node that a GPU hangs on: memory of another one is reached through the other socket.

A process that is bound to no node takes its pages where it happens to run, so half of the ranks of
a machine with two sockets would pin memory on the wrong one.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

SYSFS = Path("/sys/bus/pci/devices")


def pci_address(ordinal: int) -> str:
    """`domain:bus:device.function` of a CUDA device, as sysfs spells it.

    Args:
        ordinal: the device's number, as torch counts.

    Raises:
        OSError: there is no NVIDIA driver.
        RuntimeError: the driver does not tell.
    """
    library = ctypes.CDLL("libcuda.so.1")
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    # Ordinals of the driver obey CUDA_VISIBLE_DEVICES as torch's do; those of nvidia-smi do not.
    for error in (
        library.cuInit(0),
        library.cuDeviceGet(ctypes.byref(handle), ordinal),
        library.cuDeviceGetPCIBusId(text, len(text), handle),
    ):
        if error:
            raise RuntimeError(f"the NVIDIA driver does not tell the PCI address: error {error}")
    return text.value.decode().lower()


def node_of(device: torch.device, sysfs: Path = SYSFS) -> int | None:
    """The NUMA node of a CUDA device, or None where the machine does not tell of any."""
    try:
        text = (sysfs / pci_address(device.index or 0) / "numa_node").read_text()
    except (OSError, RuntimeError):  # a virtual machine may hide it; then memory lies where it lies
        return None
    return None if (node := int(text)) < 0 else node
