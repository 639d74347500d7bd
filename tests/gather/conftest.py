"""Small native libraries, compiled from the core's own sources, for what has no Python face."""

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

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
