"""What the kernel tells in /proc and /sys, which a sandbox may hide."""

from __future__ import annotations

from pathlib import Path


def text_of(path: Path) -> str | None:
    """The text of a file of the kernel's, or None where it is missing or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return None
