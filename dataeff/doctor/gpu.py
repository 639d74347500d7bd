"""The GPU, its driver, and the PCIe link that everything crosses."""

from __future__ import annotations

import ctypes
import statistics
import time
from pathlib import Path

import torch

from dataeff.bench import ceilings
from dataeff.doctor.finding import Finding
from dataeff.doctor.kernel_files import text_of
from dataeff.doctor.software import output_of
from dataeff.memory.numa import SYSFS, pci_address

AREA = "GPU"
COPY_NBYTES = 256 << 20
NUM_COPIES = 5
# Transfer rate of one lane in GT/s -> PCIe generation (PCI Express Base Specification).
GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}


def findings() -> list[Finding]:
    """Driver, CUDA in torch, the GPU; with a GPU also its link and the measured copy rate."""
    found = [driver(), cuda_runtime(), device()]
    if torch.cuda.is_available():
        found += [pcie_link(SYSFS), host_to_device()]
    return found


def driver_version() -> int | None:
    """The CUDA version the driver supports (13000 is 13.0), or None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    # Needs no cuInit, so nothing is initialised by asking.
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def driver() -> Finding:
    """The NVIDIA driver is loaded."""
    version = driver_version()
    return Finding(
        "NVIDIA driver",
        ok=version is not None,
        value="not found"
        if version is None
        else f"supports CUDA {version // 1000}.{version % 1000 // 10}",
        cost="no GPU: everything runs on the CPU, and nothing is gathered over PCIe",
        remedy="install the NVIDIA driver; in a container, start it with --gpus all",
        area=AREA,
    )


def cuda_runtime() -> Finding:
    """Torch has CUDA, and not a newer one than the driver."""
    runtime, supported = torch.version.cuda, driver_version()
    if runtime is None:
        return Finding(
            "CUDA in torch",
            ok=False,
            value="torch is a CPU build",
            cost="torch cannot use a GPU, so dataeff cannot either",
            remedy="install a CUDA build of torch (https://pytorch.org/get-started/locally)",
            area=AREA,
        )
    major = int(runtime.partition(".")[0])
    return Finding(
        "CUDA in torch",
        ok=supported is not None and supported // 1000 >= major,
        value=runtime,
        cost="the driver is older than torch's CUDA, or missing: torch cannot use the GPU",
        remedy=f"update the driver to one that supports CUDA {major}, or install an older torch",
        area=AREA,
    )


def device() -> Finding:
    """Torch sees a GPU."""
    if not torch.cuda.is_available():
        return Finding(
            "GPU",
            ok=False,
            value="torch sees none",
            cost="the GPU halves of all three systems are idle",
            remedy="see the driver and CUDA lines above; check CUDA_VISIBLE_DEVICES",
            area=AREA,
        )
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / (1 << 30)
    capability = f"{properties.major}.{properties.minor}"
    count = torch.cuda.device_count()
    return Finding(
        "GPU",
        ok=properties.major >= 8,
        value=f"{properties.name}, {memory_gib:.0f} GiB, compute capability {capability}"
        + (f", one of {count}" if count > 1 else ""),
        cost="kernels are built and tested for compute capability 8.0 and later",
        remedy="build for it: DATAEFF_CUDA_ARCHS=" + capability.replace(".", ""),
        area=AREA,
        figures={"name": properties.name, "memory_gib": round(memory_gib, 1), "count": count},
    )


def link_from_sysfs(sysfs: Path, address: str) -> tuple[int, int, int] | None:
    """(fastest generation, width, largest width), or None where sysfs does not tell."""
    names = ("max_link_speed", "current_link_width", "max_link_width")
    told = [text_of(sysfs / address / name) for name in names]
    try:
        speed, width, widest = ((text or "").split()[0] for text in told)
        return GENERATIONS[float(speed)], int(width), int(widest)
    except (IndexError, KeyError, ValueError):  # hidden, or "Unknown" behind some virtual bridges
        return None


def link_from_nvidia_smi(address: str) -> tuple[int, int, int] | None:
    """The same from nvidia-smi, or None where it is missing or does not tell."""
    query = "pcie.link.gen.max,pcie.link.width.current,pcie.link.width.max"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={address}"]
    cells = output_of(command).strip().split(", ")
    if len(cells) != 3 or not all(cell.isdigit() for cell in cells):
        return None
    return int(cells[0]), int(cells[1]), int(cells[2])


def pcie_link(sysfs: Path) -> Finding:
    """The PCIe link is as wide as both of its ends allow."""
    address = pci_address(0)
    link = link_from_sysfs(sysfs, address) or link_from_nvidia_smi(address)
    if link is None:  # a virtual machine may hide it; the measured rate tells as much
        return Finding("PCIe link", ok=True, value=f"not told for {address}", area=AREA)
    # Only the width tells of a bad slot: the current speed falls whenever the GPU idles.
    generation, width, widest = link
    return Finding(
        "PCIe link",
        ok=width == widest,
        value=f"generation {generation}, x{width} of x{widest} ({address})",
        cost=f"only {width} of {widest} lanes: gathers and offloads run at that share of the rate",
        remedy="move the card to a full-width slot, or free the lanes another device shares",
        area=AREA,
        figures={"generation": generation, "width": width, "max_width": widest},
    )


def host_to_device() -> Finding:
    """The measured rate of copies from pinned host memory."""
    step = ceilings.host_to_device(COPY_NBYTES).prepare(None)
    samples = []
    for _ in range(1 + NUM_COPIES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step.call()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    bandwidth_gbs = COPY_NBYTES / statistics.median(samples[1:]) / 1e9
    return Finding(
        "host to device",
        ok=bandwidth_gbs >= 10,
        value=f"{bandwidth_gbs:.1f} GB/s, measured from pinned memory",
        cost="features and activations cross this link: below 10 GB/s it is likely the bottleneck",
        remedy="check the link's width, and that the process runs on the GPU's NUMA node (numactl)",
        area=AREA,
        figures={"bandwidth_gbs": round(bandwidth_gbs, 2)},
    )
