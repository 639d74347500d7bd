"""What this machine can do for dataeff, what each missing thing costs, and how to get it."""

from __future__ import annotations

from pathlib import Path

from dataeff.doctor import disk, gpu, host, software
from dataeff.doctor.finding import Finding

__all__ = ["Finding", "examine"]


def examine(directory: Path) -> list[Finding]:
    """Runs every probe, in the order of the screen; takes a few seconds.

    Args:
        directory: where spill files and features on disk would be; its bandwidth is measured with
            an unnamed file that is gone afterwards.
    """
    return [
        *software.findings(),
        *gpu.findings(),
        *host.findings(),
        *disk.findings(directory),
    ]
