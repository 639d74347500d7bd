"""What several commands take: a device, a directory, a file to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dataeff.cli import UserError

if TYPE_CHECKING:
    import torch

Device = Annotated[
    str | None, typer.Option(help="cpu or cuda; cuda by default when there is a GPU.")
]


def torch_device(name: str | None) -> torch.device:
    """The device named, or the GPU when there is one, else the CPU."""
    import torch

    if name not in (None, "cpu", "cuda"):
        raise UserError(f"--device: {name!r} is neither cpu nor cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError("--device: torch sees no CUDA device here; `dataeff doctor` says why")
    return torch.device(name or ("cuda" if there else "cpu"))


def existing_directory(option: str, path: Path | None) -> Path:
    """The directory named, or the temporary directory."""
    directory = path or Path(tempfile.gettempdir())
    if not directory.is_dir():
        raise UserError(f"{option}: {directory} is not a directory")
    return directory


def check_writable(option: str, path: Path | None) -> None:
    """Says so before minutes are spent on results that could not be kept."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option}: the folder {folder} does not exist")
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder, not a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option}: {path} is not writable")
