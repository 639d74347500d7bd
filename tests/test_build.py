"""The core builds with and without CUDA, only what changed is compiled again, errors are plain."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dataeff import _core

ROOT = Path(__file__).resolve().parents[1]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_core", sys.argv[1])
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
print(core.cuda_built)
"""


def build(folder, **environment):
    """Builds the core into `folder`; returns the finished process."""
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib")],
        cwd=ROOT,
        env={**os.environ, "DATAEFF_BUILD_DIR": str(folder / "objects"), **environment},
        capture_output=True,
        text=True,
    )


def cuda_built(folder):
    """Loads the module that was built, in a process of its own."""
    (module,) = (folder / "lib" / "dataeff").glob("_core*.so")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(module)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip() == "True"


def test_without_cuda_then_nothing_left_to_do(tmp_path):
    # Most objects are those of the build under test, and minutes to compile.
    objects = ROOT / "build" / f"core-{sys.implementation.cache_tag}"
    if objects.exists():
        shutil.copytree(objects, tmp_path / "objects")
        (tmp_path / "objects" / "_core.so").unlink(missing_ok=True)
    first = build(tmp_path, DATAEFF_CUDA="0")
    assert first.returncode == 0, first.stderr
    assert not cuda_built(tmp_path)
    again = build(tmp_path, DATAEFF_CUDA="0")
    assert again.returncode == 0
    assert "no work to do" in again.stdout


@needs_nvcc
def test_the_build_under_test_is_one_with_cuda():
    assert _core.cuda_built or os.environ.get("DATAEFF_CUDA") == "0"


@needs_nvcc
def test_architectures_are_those_wished(tmp_path):
    build(tmp_path, DATAEFF_CUDA="1", DATAEFF_CUDA_ARCHS="90", CXX="false")
    plan = (tmp_path / "objects" / "build.ninja").read_text()
    made = re.findall(r",code=(\w+)", plan)
    assert set(made) == {"sm_90", "compute_90"}


@needs_nvcc
def test_an_unknown_architecture_is_named(tmp_path):
    done = build(tmp_path, DATAEFF_CUDA="1", DATAEFF_CUDA_ARCHS="12345")
    assert done.returncode != 0
    assert "12345" in done.stderr


# setup.py on a machine whose only compilers for CUDA are those of the Python packages in argv[1].
SETUP_WITH_PACKAGES_OF = """
import pathlib, shutil, sys, sysconfig
packages = pathlib.Path(sys.argv[1])
sys.argv = ["setup.py", "build_ext", "--build-lib", str(packages / "lib")]
shutil.which = lambda name: None
get_paths, exists = sysconfig.get_paths, pathlib.Path.exists
sysconfig.get_paths = lambda *given: {**get_paths(*given), "purelib": str(packages)}
hides = lambda p: p.name == "nvcc" and packages not in p.parents
pathlib.Path.exists = lambda p, **kw: not hides(p) and exists(p, **kw)
path = pathlib.Path("setup.py").resolve()
exec(compile(path.read_text(), path, "exec"), {"__file__": str(path), "__name__": "__main__"})
"""


def setup_with_packages_of(folder, **environment):
    without = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "-c", SETUP_WITH_PACKAGES_OF, str(folder)],
        cwd=ROOT,
        env={**without, "DATAEFF_BUILD_DIR": str(folder / "objects"), **environment},
        capture_output=True,
        text=True,
    )


def test_cuda_wished_but_no_nvcc(tmp_path):
    done = setup_with_packages_of(tmp_path, DATAEFF_CUDA="1")
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr and "DATAEFF_CUDA=0" in done.stderr


def test_nvcc_of_a_python_package_links_with_its_own_libraries(tmp_path):
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho compute_90\n")  # compiles nothing
    nvcc.chmod(0o755)
    done = setup_with_packages_of(tmp_path, DATAEFF_CUDA_ARCHS="90", CXX="false")
    plan = (tmp_path / "objects" / "build.ninja").read_text()
    assert done.returncode != 0  # `false` is no C++ compiler
    assert f"command = {nvcc} -ccbin false -shared" in plan
    assert f"-L{tmp_path}/nvidia/cu13/lib " in plan


def test_a_misspelt_wish_is_named(tmp_path):
    done = build(tmp_path, DATAEFF_CUDA="yes")
    assert done.returncode != 0
    assert "'yes' is not one of auto, 0, 1" in done.stderr
