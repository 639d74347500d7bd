"""Folders for the files of a benchmark."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path


def new_folder(directory: Path, until: ExitStack) -> Path:
    """A folder that is gone when `until` ends, also when an interrupt cuts off its removal."""
    folder = tempfile.TemporaryDirectory(dir=directory, prefix="dataeff-bench-")
    until.callback(shutil.rmtree, folder.name, ignore_errors=True)
    return Path(until.enter_context(folder))
