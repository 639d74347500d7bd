"""`python -m dataeff.integrations.pyg data.pt folder`: a saved graph as a folder of tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from dataeff.integrations.pyg.dataset import save_dataset


def main(arguments: Sequence[str] | None = None) -> None:
    """Converts one file; what was typed wrongly is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(
        "python -m dataeff.integrations.pyg",
        description="Write a graph and its features as files that are mapped rather than read.",
    )
    parser.add_argument(
        "source", help="a file of torch.save that you trust, with a Data or HeteroData"
    )
    parser.add_argument("folder", help="where to write it; must not exist")
    given = parser.parse_args(arguments)
    try:
        save_dataset(_loaded(given.source), given.folder, say=print)
    except (OSError, TypeError, ValueError, IndexError) as mistake:
        parser.exit(2, f"{parser.prog}: {mistake}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")


def _loaded(source: str) -> Any:
    try:
        # A pickle runs what it names, as PyG's own classes ask for.
        return torch.load(source, weights_only=False, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # of any kind: whatever the file made the pickle do
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{source} is no file that torch.load reads: {type(error).__name__}: {reason}"
        ) from error


if __name__ == "__main__":
    main(sys.argv[1:])
