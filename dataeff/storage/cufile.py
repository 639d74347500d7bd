"""GPUDirect Storage: whether cuFile is here, and whether it works."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from dataeff import _core
from dataeff.storage.spill import SpillFile

LIBRARY = "libcufile.so.0"
_PROBE_BYTES = 1 << 20


def _packaged() -> tuple[str, ...]:
    folders = (Path(folder or ".") for folder in sys.path)
    return tuple(str(path) for folder in folders for path in folder.glob(f"nvidia/*/lib/{LIBRARY}"))


def cufile_library() -> str | None:
    """The cuFile library that can be loaded: the system's, else a Python package's."""
    for name in (LIBRARY, *_packaged()):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


def cufile_refusal(
    directory: str | os.PathLike[str],
    device: torch.device | str = "cuda",
    library: str | None = None,
) -> str | None:
    """Why bytes do not go between `directory` and `device` by cuFile, or None when they did.

    A file in `directory` is written from device memory and read back by cuFile, and the bytes are
    compared: that it loads says nothing, since where a link of the chain is missing it falls back
    to copies through host memory, or fails at the first transfer.

    Args:
        directory: on the disk in question.
        device: whose memory.
        library: path of the cuFile library; searched for when None.
    """
    library = library or cufile_library()
    if library is None:
        return f"{LIBRARY} is neither on the system nor in a Python package"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        return _round_trip(Path(directory), torch.device(device), library)
    except OSError as error:
        return error.strerror or str(error)


def _round_trip(directory: Path, device: torch.device, library: str) -> str | None:
    sent = torch.randint(0, 256, (_PROBE_BYTES,), dtype=torch.uint8).to(device)
    back = torch.zeros_like(sent)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # cuFile is not ordered with any stream
    with SpillFile(directory) as spill:
        if not spill.direct:
            return f"{directory} has no direct I/O"
        with _core.make_cufile_engine(library, 1) as engine:
            extent = spill.allocate(_PROBE_BYTES)
            try:
                engine.write(spill.fd, sent.data_ptr(), _PROBE_BYTES, extent.offset).wait()
                engine.read(spill.fd, back.data_ptr(), _PROBE_BYTES, extent.offset).wait()
            except EOFError as error:
                return f"cuFile wrote less than it said: {error}"
    return None if torch.equal(sent, back) else "cuFile brought back other bytes than it took"
