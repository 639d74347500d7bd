"""Small native libraries, compiled from the core's own sources, for what has no Python face."""

import ctypes
import mmap
import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def native_library(tmp_path_factory):
    """Compiles sources beside this file (and of csrc/); undefined behaviour ends the process."""

    def build(*sources: str) -> ctypes.CDLL:
        library = tmp_path_factory.mktemp("native") / f"{Path(sources[0]).stem}.so"
        here = Path(__file__).parent
        paths = [
            here / source if (here / source).exists() else ROOT / "csrc" / source
            for source in sources
        ]
        subprocess.run(
            [
                *(os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-shared", "-fPIC"),
                *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
                *(f"-I{ROOT / 'csrc'}", "-o", str(library)),
                *map(str, paths),
            ],
            check=True,
        )
        return ctypes.CDLL(str(library))

    return build


@pytest.fixture
def vast():
    """9 GiB of zeros, [3 * 2^30, 3], of which only the pages that are written are ever there."""
    no_reserve = 0x4000  # mmap.MAP_NORESERVE from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 3 * 3 * 2**30, flags=flags)
    return torch.frombuffer(memory, dtype=torch.uint8).view(-1, 3)


@pytest.fixture
def far_rows(vast):
    """Row numbers in it on both sides of 2^31 and of 2^32 bytes, its first and its last."""
    return torch.tensor([2**31, 0, -1, 2**32 // 3, 2**31 - 1, -(2**31) - 7, len(vast) - 2])
