"""Python, the packages, and the compilers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from dataeff import _core
from dataeff.doctor.finding import Finding

AREA = "software"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
OLDEST_TORCH = (2, 10)
# What dataeff and its build read -> a pattern of its values.
VARIABLES = {
    "DATAEFF_BENCH_FULL": r"[01]?",
    "DATAEFF_BUILD_DIR": r".*",
    "DATAEFF_CACHE_DIR": r".*",
    "DATAEFF_COMMIT": r".*",
    "DATAEFF_CUDA": r"auto|0|1",
    "DATAEFF_CUDA_ARCHS": r"\d+[a-z]?([;, ]\d+[a-z]?)*",
    "DATAEFF_GATHER_BLOCKS": r"[1-9]\d*|",
    "DATAEFF_RGNN_BACKEND": r"auto|reference|cpp|triton",
    "DATAEFF_UPDATE_GOLDEN": r".*",
}


def findings() -> list[Finding]:
    """Python, torch, Triton, the core, optional packages, and compilers."""
    return [
        python(),
        torch_version(),
        triton(),
        core(),
        package(
            "torch-geometric", "dataeff.integrations.pyg and PyG as a peer in benchmarks", "pyg"
        ),
        package("matplotlib", "plots in `dataeff bench --plot` and in the demo's report", "report"),
        package("scipy", 'plans of ActivationOffload(policy="auto")', "plan"),
        compiler(),
        nvcc(),
        kernel_cache(),
        variables(),
    ]


def python() -> Finding:
    """Python is one that is tested."""
    version = sys.version_info[:2]
    return Finding(
        "Python",
        ok=OLDEST_PYTHON <= version <= NEWEST_PYTHON,
        value=platform.python_version(),
        cost="dataeff is tested on Python 3.10 to 3.13 only",
        remedy="make a virtual environment with one of these",
        area=AREA,
        essential=version < OLDEST_PYTHON,
    )


def torch_version() -> Finding:
    """Torch is recent enough."""
    version = str(torch.__version__)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return Finding(
        "torch",
        ok=numbers >= OLDEST_TORCH,
        value=version,
        cost="dataeff needs torch 2.10 or later",
        remedy="pip install --upgrade 'torch>=2.10'",
        area=AREA,
        essential=True,
    )


def triton() -> Finding:
    """Triton is installed: the relational kernels for GPUs are written in it."""
    version = installed("triton")
    return Finding(
        "Triton",
        ok=version is not None,
        value=version or "not installed",
        cost="dataeff.rgnn has no GPU kernels: layers run in plain PyTorch there",
        remedy="pip install triton (Linux; torch's CUDA wheels bring it)",
        area=AREA,
    )


def core() -> Finding:
    """The compiled core has its CUDA half (without a core, `import dataeff` fails)."""
    return Finding(
        "compiled core",
        ok=_core.cuda_built,
        value="with CUDA" if _core.cuda_built else "built without CUDA",
        cost="feature gathering and sampling cannot use a GPU",
        remedy="get nvcc (see its line) and reinstall with DATAEFF_CUDA=1",
        area=AREA,
    )


def package(name: str, gives: str, extra: str) -> Finding:
    """An optional package is installed."""
    version = installed(name)
    return Finding(
        name,
        ok=version is not None,
        value=version or "not installed",
        cost=f"no {gives}",
        remedy=f"pip install 'dataeff[{extra}]'",
        area=AREA,
    )


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compiler() -> Finding:
    """A C++ compiler is there and takes C++20; looked for as the layers' compiler does."""
    from dataeff.rgnn.cpp.toolchain import CompilerMissing, find_compiler

    try:
        found = find_compiler(os.environ.get("CXX"), os.environ.get("PATH"))
    except CompilerMissing as missing:
        value, ok = str(missing).partition(". ")[0], False  # the rest of it is the remedy
    else:
        ok = compiles_cpp20(found.command)
        version = found.version.partition("\n")[0]
        does = "" if ok else " does not compile C++20"
        value = f"{version}{does} ({' '.join(found.command)})"
    return Finding(
        "C++ compiler",
        ok=ok,
        value=value,
        cost="relational layers run in plain PyTorch on a CPU, and dataeff cannot be built here",
        remedy="apt install g++ (11 or later), or point CXX at a compiler that knows C++20",
        area=AREA,
    )


def compiles_cpp20(command: Sequence[str]) -> bool:
    """Whether a compiler, its command in words, takes a small program in C++20."""
    program = "#include <span>\nint main() { std::span<int> s; return static_cast<int>(s.size()); }"
    done = subprocess.run(
        [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input=program,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0


def nvcc() -> Finding:
    """The CUDA compiler is there, where setup.py looks for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    site_packages = Path(sysconfig.get_paths()["purelib"])
    candidates += sorted(site_packages.glob("nvidia/cu*/bin/nvcc"), reverse=True)
    found = next((path for path in candidates if path.exists()), None)
    release = ""
    if found is not None:
        match = re.search(r"release ([\d.]+)", output_of([str(found), "--version"]))
        release = f"{match[1] if match else 'version unknown'} ({found})"
    return Finding(
        "nvcc",
        ok=found is not None,
        value=release or "not found",
        cost="an install from source gets no CUDA gather and no CUDA sampling",
        remedy="install the CUDA toolkit and point CUDA_HOME at it, or, for a torch of CUDA 13.0, "
        "pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*'",
        area=AREA,
    )


def kernel_cache() -> Finding:
    """Compiled layers can be kept for the next process."""
    from dataeff.rgnn.cpp.toolchain import cache_root

    folder = Path(cache_root()).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
        refused = ""
    except OSError as error:
        refused = f" cannot be written: {error.strerror}"
    return Finding(
        "kernel cache",
        ok=not refused,
        value=f"{folder}{refused}",
        cost="every process compiles its layers anew: seconds at the first call of each",
        remedy="set DATAEFF_CACHE_DIR to a folder that you can write to",
        area=AREA,
    )


def variables() -> Finding:
    """The environment variables of dataeff's own that are set have a name and a value it knows."""
    there = {name: value for name, value in os.environ.items() if name.startswith("DATAEFF_")}
    wrong = [
        f"{name}={value} " + (f"is not {VARIABLES[name]}" if name in VARIABLES else "is unknown")
        for name, value in there.items()
        if name not in VARIABLES or not re.fullmatch(VARIABLES[name], value)
    ]
    return Finding(
        "variables",
        ok=not wrong,
        value="; ".join(wrong) or ", ".join(f"{n}={v}" for n, v in there.items()) or "none set",
        cost="an unknown variable changes nothing, and a wrong value is refused where it is used",
        remedy="unset them, or correct them: " + ", ".join(VARIABLES),
        area=AREA,
    )


def output_of(command: list[str]) -> str:
    """What a program prints, or why it does not run."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
