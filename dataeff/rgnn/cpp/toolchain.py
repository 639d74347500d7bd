"""Compiles generated C++ with the system compiler and keeps the result by content.

    library = compile_cpp(PARALLEL_HEADER + source)      # a ctypes.CDLL
    library.kernel.argtypes = [ctypes.c_void_p, ctypes.c_int64]

An object is found again by the source, the flags, the compiler's version and the CPU it was made
for. `<key>.cpp` is the readable source, `<key>.<digest>.so` the object, named by its own content:
a truncated or altered file does not carry the name of what it holds and is built anew. Files
appear by rename, so two processes that build the same thing never see half of it.

For parallel loops, start the source with `PARALLEL_HEADER` (see `parallel` for the choice and
the figures behind it) and pass `torch.get_num_threads()` as their number of threads.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataeff.rgnn.cpp import parallel
from dataeff.rgnn.cpp.parallel import PARALLEL_HEADER

__all__ = ["PARALLEL_HEADER", "CompileError", "CompilerMissing", "cache_dir", "compile_cpp"]

# -ffast-math is left out: it assumes there is no inf or nan, and a masked softmax makes both.
# -fopenmp-simd allows `#pragma omp simd reduction(...)`, which reorders one sum where it is asked.
BASE_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread", "-Wall"),
    # GCC for Zen 1 to 3 multiplies and adds in one rounding in some register tiles and in two in
    # others, so that a row's bits would depend on which tile it falls into. Clang takes no notice.
    *("--param", "avoid-fma-max-bits=0"),
)

_REMEDY = (
    "Install one (Debian: apt-get install g++; conda: conda install gxx) or point CXX at it;"
    " without one the layers run on plain PyTorch"
)

_libraries: dict[str, ctypes.CDLL] = {}
# By $CXX and $PATH: programs that compile nothing, and how each was refused.
_broken: dict[tuple[str | None, str | None], dict[str, CompilerMissing]] = {}


class CompilerMissing(RuntimeError):
    """No C++ compiler was found, or the one found compiles nothing."""


class CompileError(RuntimeError):
    """The compiler refused a generated source; the message is the compiler's."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command's words, and the version that it prints."""

    command: tuple[str, ...]
    version: str


def compile_cpp(source: str, *, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compiles and loads a C++ source, or loads what an earlier call or process compiled.

    Args:
        source: one translation unit; what is called from outside is `extern "C"` with default
            visibility.
        flags: added after `BASE_FLAGS`, so they win.

    Raises:
        CompilerMissing: there is no compiler that compiles anything.
        CompileError: the compiler refused this source.
    """
    where = os.environ.get("CXX"), os.environ.get("PATH")
    broken = _broken.setdefault(where, {})
    while True:
        try:
            compiler = find_compiler(*where, frozenset(broken))
        except CompilerMissing as missing:
            raise next(iter(broken.values()), missing) from None
        try:
            return _load(source, flags, compiler)
        except CompilerMissing as error:
            broken[compiler.command[0]] = error


def _load(source: str, flags: Sequence[str], compiler: Compiler) -> ctypes.CDLL:
    key = _key(source, flags, compiler)
    if key not in _libraries:
        folder = cache_dir()
        try:
            path = _kept(folder, key) or _build(folder, key, source, flags, compiler)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            path = _build(_private(folder, str(error)), key, source, flags, compiler)
        library = ctypes.CDLL(str(path))
        parallel.bind(library)
        _libraries[key] = library
    return _libraries[key]


def why_none_compiles() -> str | None:
    """What keeps every compiler here from compiling; None where one does."""
    try:
        compile_cpp("// nothing\n")
    except CompilerMissing as missing:
        return str(missing)
    return None


@functools.cache
def find_compiler(
    wish: str | None, path: str | None, broken: frozenset[str] = frozenset()
) -> Compiler:
    """The compiler in $CXX, which may hold flags as well, else the first usual name on the PATH.

    Programs that are `broken` are none.
    """
    wish = (wish or "").strip()
    for name in [wish] if wish else ["c++", "g++", "clang++"]:
        words = name.split()
        program = shutil.which(words[0], path=path)
        if program is None or program in broken:
            continue
        if (said := _run([program, "--version"])) is not None and said.returncode == 0:
            return Compiler((program, *words[1:]), said.stdout)
    looked = f"CXX={wish} does not run" if wish else "none of c++, g++, clang++ is on the PATH"
    raise CompilerMissing(f"no C++ compiler: {looked}. {_REMEDY}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    """What a command said, or None where the file is no program that this machine starts."""
    try:
        return _finish(command)
    except OSError:
        return None


def _finish(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What a command said. An interrupt ends it and waits: compilers then remove what they wrote.

    `subprocess.run` would kill it, which leaves its temporary files, and not wait for it.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            said, complained = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


@functools.cache
def _refuse_if_broken(compiler: Compiler) -> None:
    """Refuses a compiler that answers for its version but has no headers, assembler or linker.

    Raises:
        CompilerMissing: it refuses a source that nothing can be wrong with.
    """
    with tempfile.TemporaryDirectory(prefix="dataeff-probe-") as scratch:
        source, made = Path(scratch) / "probe.cpp", Path(scratch) / "probe.so"
        source.write_text(
            "#include <vector>\nint probe() { return std::vector<int>(1).front(); }\n"
        )
        done = _run([*compiler.command, *BASE_FLAGS, str(source), "-o", str(made)])
        if done is None or done.returncode != 0 or not made.exists():
            said = "" if done is None else done.stderr.strip()
            raise CompilerMissing(
                f"no C++ compiler: {compiler.command[0]} compiles nothing, it says {said!r}."
                f" {_REMEDY}"
            )


def cache_root() -> str:
    """DATAEFF_CACHE_DIR, else dataeff/ in XDG_CACHE_HOME or ~/.cache; it need not exist."""
    if named := os.environ.get("DATAEFF_CACHE_DIR"):
        return named
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "dataeff")


def cache_dir() -> Path:
    """Where sources and objects are kept, in cpp/ of `cache_root()`; made when it is missing."""
    folder = _writable(cache_root())
    folder.mkdir(parents=True, exist_ok=True)  # a long process may outlive what cleans caches
    return folder


@functools.cache
def _writable(root: str) -> Path:
    folder = Path(root) / "cpp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        return _private(folder, str(error.strerror))


_private_folders: dict[Path, Path] = {}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _private(folder: Path, reason: str) -> Path:
    """This process's own folder in the place of one that cannot be written; it warns once."""
    if folder not in _private_folders:
        private = Path(tempfile.mkdtemp(prefix="dataeff-cache-"))
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        warnings.warn(
            f"{folder} cannot be written ({reason}), so compiled kernels go to {private} "
            "until this process ends; set DATAEFF_CACHE_DIR to keep them",
            stacklevel=4,
        )
        _private_folders[folder] = private / "cpp"
    _private_folders[folder].mkdir(parents=True, exist_ok=True)
    return _private_folders[folder]


@functools.cache
def cpu_name() -> str:
    """What -march=native depends on, so that a shared home never serves another CPU's object."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({x for x in lines if x.startswith(wanted)}))


def _key(source: str, flags: Sequence[str], compiler: Compiler) -> str:
    parts = [source, *BASE_FLAGS, *flags, *compiler.command, compiler.version, cpu_name()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _kept(folder: Path, key: str) -> Path | None:
    for path in sorted(folder.glob(f"{key}.*.so")):
        if path.name == f"{key}.{_digest(path)}.so":
            return path
        path.unlink(missing_ok=True)
    return None


def _build(folder: Path, key: str, source: str, flags: Sequence[str], compiler: Compiler) -> Path:
    with tempfile.TemporaryDirectory(prefix=f"{key}.", dir=folder) as scratch:
        written, made = Path(scratch) / f"{key}.cpp", Path(scratch) / "kernel.so"
        written.write_text(source)
        command = [*compiler.command, *BASE_FLAGS, *flags, str(written), "-o", str(made)]
        done = _finish(command)
        readable = written.replace(folder / written.name)
        if done.returncode != 0 or not made.exists():
            if os.strerror(errno.ENOSPC) in done.stderr:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            _refuse_if_broken(compiler)
            raise CompileError(
                f"{compiler.command[0]} refused {readable} (exit {done.returncode}):\n{done.stderr}"
            )
        return made.replace(folder / f"{key}.{_digest(made)}.so")
