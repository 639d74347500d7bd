"""Builds the pretended device for the Python and the CUDA torch that run this."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the kernels on the host
from cuda_kernels import SOURCES as KERNEL_SOURCES
from cuda_kernels import translated

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNTIME, DRIVER = "libcudart.so", "libcuda.so"
ARITHMETIC, CORE = "arithmetic.so", "_core.so"


def torch_folder() -> Path:
    """Where torch is, without importing it: the runtime must be there first."""
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def cuda_include() -> Path:
    """The toolkit's headers: torch's packages leave out some."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return Path(home) / "include"


def names(library: Path, pattern: str, *options: str) -> set[str]:
    """Names of that pattern that a library defines, or with `-u` asks for."""
    listed = subprocess.run(
        ["nm", "-D", *options, library], check=True, capture_output=True, text=True
    )
    return set(re.findall(rf"\b({pattern})\b", listed.stdout))


def newer(target: Path, *sources: Path) -> bool:
    return target.exists() and all(target.stat().st_mtime > s.stat().st_mtime for s in sources)


def compile_library(target: Path, sources: list[Path], flags: list[str]) -> None:
    """Compiles side by side; objects that are newer than every header of ours are kept."""
    headers = [*HERE.glob("*.h"), *HERE.glob("include/*"), *(ROOT / "csrc").rglob("*.h*")]
    headers += [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "tests/cuda_on_host").glob("*.h")]
    cxx = os.environ.get("CXX", "c++")
    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        name = str(source).removeprefix(str(ROOT)).replace("/", "_")
        made = folder / f"{name}.o"
        if not newer(made, source, *headers):
            what = [f for f in flags if not f.startswith(("-l", "-L", "-Wl"))]
            subprocess.run([cxx, "-fPIC", "-g1", *what, "-c", source, "-o", made], check=True)
        return str(made)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    if not newer(target, *map(Path, objects)):
        partial = target.with_suffix(".partial")
        subprocess.run([cxx, "-shared", *objects, *flags, "-o", partial], check=True)
        partial.replace(target)


def build_pretended(target: Path, soname: str, source: Path, pattern: str, refuse: str) -> None:
    """A library in the place of one of CUDA's.

    What it lacks of the names of that pattern that torch's libraries ask for calls `refuse`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    version, stubs = target.with_suffix(".map"), target.with_suffix(".missing.cpp")
    version.write_text(f"{soname} {{ global: *; }};\n")
    asked = [names(p, pattern, "-u") for p in (torch_folder() / "lib").glob("*.so")]
    has = set(re.findall(rf"\b({pattern})\(", source.read_text()))
    text = f'extern "C" {{\nint {refuse}(const char*);\n'
    for name in sorted(set().union(*asked) - has):
        text += f'int {name}() {{ return {refuse}("{name}"); }}\n'
    if not stubs.exists() or stubs.read_text() != text + "}\n":
        stubs.write_text(text + "}\n")
    flags = ["-std=c++20", "-O2", "-Wall", "-pthread", f"-I{cuda_include()}"]
    flags += [f"-Wl,-soname,{soname}", f"-Wl,--version-script={version}"]
    compile_library(target, [source, stubs], flags)


def build_runtime(folder: Path) -> None:
    needed = subprocess.run(
        ["readelf", "-d", torch_folder() / "lib/libc10_cuda.so"], capture_output=True, text=True
    )
    (soname,) = re.findall(r"libcudart\.so\.\d+", needed.stdout)
    refuse = "pretended_cuda_missing"
    build_pretended(folder / RUNTIME, soname, HERE / "cudart.cpp", r"(?:__)?cuda[A-Z]\w*", refuse)
    # Not those of libraries, as cublasCreate.
    pattern = r"cu(?:Ctx|Device|Func|Get|Launch|Link|Module|Occ|Pointer|Tensor)\w*"
    refuse = "pretended_cuda_not_supported"
    build_pretended(folder / DRIVER, "libcuda.so.1", HERE / "driver.cpp", pattern, refuse)


def build_arithmetic(folder: Path) -> None:
    torch = torch_folder()
    includes = [torch / "include", torch / "include/torch/csrc/api/include"]
    flags = ["-std=c++20", "-O1", "-w", "-pthread", f"-I{cuda_include()}"]
    flags += [f"-isystem{path}" for path in includes]
    flags += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-lc10", "-lc10_cuda"]
    flags += [f"-L{folder}", f"-l:{RUNTIME}", "-Wl,--allow-shlib-undefined"]
    compile_library(folder / ARITHMETIC, [HERE / "arithmetic.cpp"], flags)


def build_core(folder: Path) -> None:
    """`dataeff._core` whose kernels run on the host, in stream order."""
    import pybind11

    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    for source in KERNEL_SOURCES:
        made = folder / f"{Path(source).stem}.cu.cpp"
        text = translated((ROOT / "csrc" / source).read_text())
        if not made.exists() or made.read_text() != text:
            made.write_text(text)
        sources.append(made)
    includes = [HERE / "include", ROOT / "csrc", cuda_include()]
    system = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++20", "-O1", "-fvisibility=hidden", "-pthread", "-DDATAEFF_WITH_CUDA=1"]
    flags += [*(f"-I{path}" for path in includes), *(f"-isystem{path}" for path in system)]
    flags += ["-Wno-unknown-pragmas", "-ldl", f"-L{folder}", f"-l:{RUNTIME}"]
    compile_library(folder / CORE, sources, flags)


def build(folder: Path) -> None:
    """Builds the libraries into `folder`."""
    build_runtime(folder)
    build_arithmetic(folder)
    build_core(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
