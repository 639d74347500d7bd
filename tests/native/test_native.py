"""Builds the core's C++ with its native tests under each sanitizer, and runs them.

Needs only a C++20 compiler. Objects are kept in build/native/, named by what they were made of.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "native"
STEMS = sorted(path.stem for path in HERE.glob("test_*.cpp"))
SANITIZERS = {
    # Unoptimised: UBSan's checks make the optimiser take four times as long.
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
# The code for processors without the vector instructions of this one.
PORTABLE = ["-O1", "-DDATAEFF_PORTABLE"]
FLAGS = ["-std=c++20", "-g1", "-fno-omit-frame-pointer", "-pthread", "-Wall", "-Wextra"]
INCLUDED = re.compile(r'#include [<"]([^>"]+)[>"]')
ADDR_NO_RANDOMIZE = 0x0040000


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler on the PATH")
    return found


def needs_python(path: Path) -> bool:
    """Whether a source includes pybind11, itself or through headers of the core."""
    for name in INCLUDED.findall(path.read_text()):
        header = ROOT / "csrc" / name
        if name.startswith("pybind11/") or (header.is_file() and needs_python(header)):
            return True
    return False


def sources() -> list[Path]:
    """The core without its Python bindings, and the tests."""
    core = [path for path in (ROOT / "csrc").rglob("*.cpp") if not needs_python(path)]
    return sorted(core) + sorted(HERE.glob("*.cpp"))


@cache
def digest_of_headers() -> str:
    headers = sorted([*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in headers)).hexdigest()


def compile_one(source: Path, flags: list[str]) -> Path:
    made_of = [*flags, str(source), digest_of_headers(), source.read_text()]
    obj = BUILD / f"{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.o"
    with obj.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of the run want it too
        if not obj.exists():
            partial = obj.with_suffix(".partial")
            command = [*flags, f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-c", str(source)]
            run([compiler(), *command, "-o", str(partial)])
            partial.replace(obj)
    return obj


def run(command: list[str], **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", params=SANITIZERS)
def native_tests(request, tmp_path_factory):
    """The test program, built under one sanitizer."""
    flags = [*FLAGS, *SANITIZERS[request.param]]
    folder = tmp_path_factory.mktemp(f"native-{request.param}")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    linked = subprocess.run(
        [compiler(), *flags, str(probe), "-o", str(folder / "probe")], capture_output=True
    )
    if linked.returncode != 0:
        pytest.skip(f"{compiler()} has no {request.param} sanitizer: {linked.stderr.decode()}")
    return link(folder, sources(), flags)


def link(folder: Path, of: list[Path], flags: list[str]) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(lambda source: str(compile_one(source, flags)), of))
    program = folder / "native_tests"
    run([compiler(), *flags, *objects, "-o", str(program), "-ldl"])
    return program


def keep_addresses() -> None:
    # Older ThreadSanitizers refuse to start where the kernel randomises more address bits than
    # they expect.
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first test of each sanitizer compiles the core
@pytest.mark.parametrize("stem", STEMS)
def test_native(native_tests, stem, tmp_path):
    out = run([str(native_tests), stem], cwd=tmp_path, timeout=300, preexec_fn=keep_addresses)
    assert out.strip().endswith(" 0 failed")


@pytest.mark.slow
def test_the_gather_of_a_plain_processor(tmp_path):
    folders = ("gather", "parallel")
    core = [path for path in sources() if path.parent.name in folders]
    tests = [HERE / "main.cpp", HERE / "test_gather.cpp"]
    program = link(tmp_path, [*core, *tests], [*FLAGS, *PORTABLE])
    assert run([str(program), "test_gather"]).strip().endswith(" 0 failed")
