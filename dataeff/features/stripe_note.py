"""What goes when a striped table takes the place of another, or a conversion to it is killed.

The stripes of a table get their names one by one, before the index that names them does. For that
moment a note beside the index lists them, and those of the table that is replaced: of what a note
lists, the files that the index does not name are of no table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dataeff.features.stripe_head import STRIPE_SUFFIX, is_stripe
from dataeff.features.table_files import STRIPES_FORMAT, read_header
from dataeff.features.whole_files import PartialFile, left_beside, lock, remove_left, sync_folder

SUFFIX = ".stripes"


@contextmanager
def noted_stripes(
    target: Path, table_id: str, paths: Sequence[Path]
) -> Iterator[Callable[[], None]]:
    """A conversion that makes the stripes `paths`; at its end those of no table are removed.

    Gives what writes the note, which is to be called before one of them has a name. It is locked
    while the conversion is under way.
    """
    note = target.with_name(f".{target.name}.{table_id[:8]}{SUFFIX}")
    noted, held = list(paths), []

    def write() -> None:
        noted.extend(_stripes_of(target))
        held.append(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        lock(held[0])
        PartialFile(note, held[0], named=True).write(json.dumps([*map(str, noted)]).encode())
        os.fsync(held[0])
        sync_folder(note.parent)

    try:
        yield write
    finally:
        _remove_unnamed(target, noted)
        note.unlink(missing_ok=True)
        for fd in held:
            os.close(fd)


def remove_left_stripes(target: Path) -> None:
    """Removes what conversions to `target` left that were killed while stripes had names."""
    for note in left_beside(target, SUFFIX):
        _remove_unnamed(target, filter(_is_ours, _listed(note)))
        note.unlink(missing_ok=True)


def _listed(note: Path) -> list[Path]:
    try:
        return [Path(path) for path in json.loads(note.read_text())]
    except (ValueError, TypeError):  # killed while it was written: no stripe had a name
        return []


def _is_ours(path: Path) -> bool:
    # Whoever may write beside the index may write a note, of files that are none of ours.
    return path.suffix == STRIPE_SUFFIX and (is_stripe(path) or not path.exists())


def _remove_unnamed(target: Path, stripes: Iterable[Path]) -> None:
    named = {path.resolve() for path in _named_by(target)}
    for path in stripes:
        remove_left(path)
        if path.resolve() not in named:
            path.unlink(missing_ok=True)


def _named_by(target: Path) -> list[Path]:
    """The files that an index names, be they there or not."""
    try:
        fields = json.loads(target.read_text())
        ours = fields["format"] == STRIPES_FORMAT
        return [target.parent / str(name) for name in fields["files"]] if ours else []
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # none there, or no index
        return []


def _stripes_of(target: Path) -> tuple[Path, ...]:
    """The files of a table that is whole and about to be replaced."""
    try:
        return read_header(target).paths
    except (FileNotFoundError, ValueError):  # none there, or none that can be read
        return ()
