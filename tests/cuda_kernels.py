"""Compiles the CUDA sources of the core for the host, kernels and launches (`cuda_on_host/`)."""

import ctypes
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).parent / "cuda_on_host"
SOURCES = ("gather/gather.cu", "sampling/frontier.cu", "memory/register.cu")
LAUNCH = re.compile(r"(\w+)<<<(.*?)>>>\((.*?)\);", re.DOTALL)
SANITIZED = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")


def translated(text: str) -> str:
    """`kernel<<<how>>>(what);` as a call of a function."""
    found, count = LAUNCH.subn(r"cuda_on_host::launch(\2, [=] { \1(\3); });", text)
    assert count == text.count("<<<")
    return found


def build(folder: Path) -> ctypes.CDLL:
    """The library; undefined behaviour, misaligned words among it, ends the process."""
    paths = [HERE / "kernels.cpp", HERE / "registration.cpp"]
    paths.append(ROOT / "csrc/memory/page_registry.cpp")
    for source in SOURCES:
        paths.append(folder / f"{Path(source).stem}.cpp")
        paths[-1].write_text(translated((ROOT / "csrc" / source).read_text()))
    library = folder / "kernels.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", *SANITIZED, "-Wno-unknown-pragmas"]
    includes = [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, *includes, *map(str, paths), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
