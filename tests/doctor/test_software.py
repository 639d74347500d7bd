import os
import re
import sys
from pathlib import Path

import pytest

from dataeff.doctor import software


@pytest.mark.parametrize(
    ("version", "ok", "essential"),
    [
        ((3, 9), False, True),
        ((3, 10), True, False),
        ((3, 13), True, False),
        ((3, 14), False, False),
    ],
)
def test_python_bounds(monkeypatch, version, ok, essential):
    monkeypatch.setattr(sys, "version_info", (*version, 0))
    found = software.python()
    assert (found.ok, found.essential) == (ok, essential)


@pytest.mark.parametrize(
    ("version", "ok"),
    [("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0.0a0+git1", True)],
)
def test_torch_bounds(monkeypatch, version, ok):
    monkeypatch.setattr("torch.__version__", version)
    found = software.torch_version()
    assert found.ok is ok and found.essential and found.value == version


def test_missing_package_names_cost_and_extra():
    found = software.package("no-such-package", "plots", "demo")
    assert not found.ok and found.value == "not installed"
    assert found.cost == "no plots" and found.remedy == "pip install 'dataeff[demo]'"


def test_core_without_cuda_is_not_essential(monkeypatch):
    monkeypatch.setattr("dataeff._core.cuda_built", False)
    found = software.core()
    assert not found.ok and not found.essential and "DATAEFF_CUDA=1" in found.remedy


def fake_program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_no_compiler_on_an_empty_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = software.compiler()
    assert not found.ok and "none of c++, g++, clang++ is on the PATH" in found.value
    assert "PyTorch" in found.cost


def test_a_compiler_may_stand_in_cxx_with_its_flags(monkeypatch, tmp_path):
    new = fake_program(tmp_path, "newcxx", 'test "$1" = --version && echo "new 14"; exit 0')
    monkeypatch.setenv("CXX", f"{new} -m64")
    found = software.compiler()
    assert found.ok and found.value == f"new 14 ({new} -m64)"
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))  # what the layers would stumble over
    found = software.compiler()
    assert not found.ok and "missing does not run" in found.value


def test_a_compiler_that_refuses_cpp20_is_not_enough(monkeypatch, tmp_path):
    old = fake_program(tmp_path, "oldcxx", 'test "$1" = --version && echo "old 4.8" || exit 1')
    monkeypatch.setenv("CXX", str(old))
    found = software.compiler()
    assert not found.ok and "old 4.8 does not compile C++20" in found.value


def test_nvcc_is_found_by_cuda_home_and_its_release_read(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    fake_program(tmp_path / "bin", "nvcc", "echo 'Cuda compilation tools, release 13.1, V13.1.80'")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = software.nvcc()
    assert found.ok and found.value.startswith("13.1 (")


def test_nvcc_on_the_path_comes_before_the_usual_place(monkeypatch, tmp_path):
    nvcc = fake_program(tmp_path, "nvcc", "echo 'release 12.4,'")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert software.nvcc().value == f"12.4 ({nvcc})"


def test_nvcc_of_a_python_package_is_found_last(monkeypatch, tmp_path):
    (tmp_path / "nvidia" / "cu13" / "bin").mkdir(parents=True)
    nvcc = fake_program(tmp_path / "nvidia" / "cu13" / "bin", "nvcc", "echo 'release 13.0,'")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(software.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    exists = Path.exists
    usual = Path("/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(Path, "exists", lambda self: self != usual and exists(self))
    assert software.nvcc().value == f"13.0 ({nvcc})"


def test_a_cache_that_cannot_be_written_is_named_and_not_made(monkeypatch, tmp_path):
    monkeypatch.setenv("DATAEFF_CACHE_DIR", str(tmp_path / "new" / "er"))
    assert software.kernel_cache().ok and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (str(tmp_path / "file" / "below"), "/proc/cache"):
        monkeypatch.setenv("DATAEFF_CACHE_DIR", folder)
        found = software.kernel_cache()
        assert not found.ok and found.value.startswith(f"{folder} cannot be written: ")


def test_variables_that_are_misspelt_or_wrong_are_named(monkeypatch):
    for name in [name for name in os.environ if name.startswith("DATAEFF_")]:
        monkeypatch.delenv(name)
    assert software.variables().value == "none set"
    monkeypatch.setenv("DATAEFF_CUDA_ARCHS", "80;90a")
    assert software.variables().ok
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "cuda")
    monkeypatch.setenv("DATAEFF_CACHEDIR", "/tmp")
    found = software.variables()
    assert not found.ok and "DATAEFF_CACHE_DIR" in found.remedy
    assert "DATAEFF_RGNN_BACKEND=cuda is not auto|reference|cpp|triton" in found.value
    assert "DATAEFF_CACHEDIR=/tmp is unknown" in found.value


def test_every_variable_that_is_read_is_known():
    root = Path(__file__).parents[2]
    sources = [root / "setup.py", *root.glob("dataeff/**/*.py"), *root.glob("benchmarks/*.py")]
    read = r'environ(?:\.get\(|\[)"(DATAEFF_\w+)"'
    names = {name for path in sources for name in re.findall(read, path.read_text())}
    assert "DATAEFF_RGNN_BACKEND" in names and names <= set(software.VARIABLES)


def test_every_finding_of_this_machine_says_what_a_missing_thing_costs():
    findings = software.findings()
    for found in findings:
        assert found.name and found.value and found.area == "software"
        assert found.cost and found.remedy
    assert {"torch-geometric", "matplotlib", "scipy"} <= {found.name for found in findings}
