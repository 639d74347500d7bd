"""The first page of each file of a striped table: which table it is of, and which part.

The files hold rows and no more beside it, and two tables of one shape have files of one size, so a
file that was moved or restored to the wrong place would give wrong rows in silence.
"""

from __future__ import annotations

import json
from pathlib import Path

FORMAT = "dataeff-stripe"
STRIPE_SUFFIX = ".rows"
HEAD_NBYTES = 4096  # one page, so that whole rows of a page are whole pages of the file


_NONE = "no stripe, or a damaged one"


def stripe_head(table_id: str, number: int, count: int) -> bytes:
    """The page: JSON, filled up with blanks, that ends in a newline."""
    fields = {"format": FORMAT, "table": table_id, "stripe": number, "of": count}
    return (json.dumps(fields).ljust(HEAD_NBYTES - 1) + "\n").encode()


def check_stripe_head(path: Path, index: Path, table_id: str, number: int, count: int) -> None:
    """ValueError naming the file and what it is unless it is that part of that table."""
    with path.open("rb") as file:
        head = file.read(HEAD_NBYTES)
    if head != stripe_head(table_id, number, count):
        raise ValueError(
            f"{path} is not stripe {number} of {count} of table {table_id}, as {index} says: it is "
            f"{_what_it_is(head)}; put back the file that dataeff.convert wrote, or convert again"
        )


def is_stripe(path: Path) -> bool:
    """Whether a file is there that begins as a stripe does, of whatever table."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_NBYTES)
    except FileNotFoundError:
        return False
    return _what_it_is(head) != _NONE


def _what_it_is(head: bytes) -> str:
    try:
        fields = json.loads(head)
        if fields["format"] == FORMAT:
            return f"stripe {fields['stripe']} of {fields['of']} of table {fields['table']}"
    except (ValueError, KeyError, TypeError):  # bytes of something else
        pass
    return _NONE
