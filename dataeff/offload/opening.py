"""What the arguments of an `ActivationOffload` ask for: checked, and the tiers opened."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dataeff.offload.disk import SpillSet
from dataeff.offload.tiers import StreamsOf, Tiers
from dataeff.offload.wear import Wear
from dataeff.storage import FaultPlan, choose_engine, cufile_refusal
from dataeff.storage.choice import DEFAULT
from dataeff.storage.engine import KINDS
from dataeff.storage.spill import FULL


def check_model(model: Any) -> None:
    """Raises TypeError where `model` is no module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: a torch.nn.Module is needed, not {type(model).__name__}")


def open_tiers(
    device: torch.device,
    directories: Sequence[Path],
    *,
    host_bytes: int,
    spill_bytes: int | None,
    staging_bytes: int,
    checksum: bool,
    engine: str,
    num_threads: int,
    faults: FaultPlan | None,
    streams_of: StreamsOf,
    wear: Wear,
) -> Tiers:
    """The host tier, the disk tier or both; a disk that is full is done without, with a warning.

    Args:
        device: that the model is on.
        directories: of the disk tier; none for the host tier alone.
        host_bytes: size of the host tier.
        spill_bytes: the most that each spill file may take.
        staging_bytes: pinned memory through which a GPU's tensors go to disk and come back.
        checksum: keep a CRC-32C of what is written.
        engine: as `ActivationOffload` takes it.
        num_threads: of the engine.
        faults: faults to inject.
        streams_of: the streams of a device.
        wear: bounds what is written to disk.

    Raises:
        TypeError: `faults` or `streams_of` is not what it should be.
        ValueError: there is no tier, or `engine` cannot serve this device and these options.
        OSError: a directory cannot be written to, or cuFile does not work there.
    """
    if not callable(streams_of):
        raise TypeError(f"streams_of={streams_of!r} cannot be called")
    if not isinstance(faults, FaultPlan | None):
        raise TypeError(f"faults={faults!r} is no FaultPlan")
    if not directories and not host_bytes:
        raise ValueError("nowhere to offload to: name a directory in spill=, or give host_bytes")
    spills = None
    if directories:
        chosen = engine == "auto"
        engine = _engine(engine, device, directories, num_threads, checksum, faults, streams_of)
        try:
            try:
                spills = SpillSet(directories, spill_bytes, engine, num_threads, faults)
            except OSError:
                if not chosen or engine == DEFAULT:
                    raise
                engine = DEFAULT  # one ring was measured; there is none for every directory
                spills = SpillSet(directories, spill_bytes, engine, num_threads, faults)
        except OSError as error:
            if error.errno not in FULL or not host_bytes:
                raise
            warnings.warn(
                f"activation offload: no spill file can be made ({error}); what would go to "
                "disk goes to the host tier or stays in memory.",
                RuntimeWarning,
                stacklevel=3,
            )
    return Tiers(
        spills, host_bytes, staging_bytes, checksum, streams_of, wear, cufile=engine == "cufile"
    )


def _engine(
    engine: str,
    device: torch.device,
    directories: Sequence[Path],
    num_threads: int,
    checksum: bool,
    faults: FaultPlan | None,
    streams_of: StreamsOf,
) -> str:
    """The kind of engine to open."""
    if not isinstance(engine, str) or engine not in ("auto", *KINDS):
        raise ValueError(f"engine={engine!r} is not one of auto, {', '.join(KINDS)}")
    if engine == "auto":
        # The bytes that cuFile moves can be neither summed nor disturbed.
        on_gpu = device.type == "cuda" and not checksum and faults is None
        where = device if on_gpu else torch.device("cpu")
        return choose_engine(directories[0], num_threads=num_threads, device=where).kind
    if engine == "cufile":
        _check_cufile(device, directories, checksum, streams_of)
    return engine


def _check_cufile(
    device: torch.device, directories: Sequence[Path], checksum: bool, streams_of: StreamsOf
) -> None:
    if streams_of(device) is None:
        raise ValueError(
            f"engine='cufile' moves the memory of a GPU, and the model is on {device}: move the "
            "model first, or take engine='threads'"
        )
    if checksum:
        raise ValueError(
            "checksum=True with engine='cufile': the bytes never pass through host memory, where "
            "they would be summed; take engine='threads'"
        )
    for directory in directories:
        refused = cufile_refusal(directory, device)
        if refused is not None:
            raise OSError(errno.ENOTSUP, f"engine='cufile': {refused}", str(directory))


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the first parameter of the model is; host memory for one without."""
    first: Any = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
