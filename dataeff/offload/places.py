"""Where to spill: the directories that `spill=` names, one set per rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataeff.storage import filesystem_of
from dataeff.storage.bandwidth import MEMORY_FILE_SYSTEMS

PathLike = str | os.PathLike[str]


def spill_directories(spill: Sequence[PathLike] | PathLike | None) -> list[Path]:
    """The directories, with `{rank}` and `{local_rank}` replaced by what torchrun has set.

    `~` and variables (`$TMPDIR`) are what they are in a shell.

    A directory that is missing is made when its name has a placeholder: a job names it, and no
    person. One that lies in memory is warned of: what is spilled there frees nothing.

    Raises:
        TypeError: `spill` is neither a path nor a list of them.
        ValueError: an empty name, or a placeholder is neither `{rank}` nor `{local_rank}`.
        OSError: a directory of a rank cannot be made.
    """
    if spill is None:
        return []
    given: Any = [spill] if isinstance(spill, (str, os.PathLike, bytes)) else spill
    try:
        names = list(given)
    except TypeError:
        raise TypeError(f"spill={spill!r}: a directory, or a list of them, is needed") from None
    for name in names:
        if not isinstance(name, (str, os.PathLike)):
            raise TypeError(f"spill={spill!r}: {name!r} is no path")
    return [_directory(os.fspath(name)) for name in names]


def _directory(name: str) -> Path:
    if not name:
        raise ValueError("spill='': name a directory; the working one is '.'")
    name = os.path.expanduser(os.path.expandvars(name))
    path = Path(_of_this_rank(name))
    if str(path) != str(Path(name)):
        path.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and (kind := filesystem_of(path)) in MEMORY_FILE_SYSTEMS:
        warnings.warn(
            f"activation offload: {path} is on {kind}, which is memory: what is spilled there "
            "frees none. Name a directory on an SSD.",
            RuntimeWarning,
            stacklevel=4,
        )
    return path


def _of_this_rank(name: str) -> str:
    if "{" not in name:
        return name
    ranks = {key.lower(): os.environ.get(key, "0") for key in ("RANK", "LOCAL_RANK")}
    try:
        return name.format(**ranks)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"spill={name!r}: only {{rank}} and {{local_rank}}, and variables that are set, can be "
            "filled in"
        ) from (error)
