"""Builds `dataeff._core`, the torch-free C++20/CUDA extension, with ninja.

Environment:
    DATAEFF_CUDA: `auto` (default) compiles the `.cu` files when nvcc is found, `1` fails when it
        is not, `0` leaves them out.
    DATAEFF_CUDA_ARCHS: compute capabilities, `80;90;100;120` by default; the last also gets PTX.
    DATAEFF_BUILD_DIR: where objects are kept between builds, `build/core-<interpreter tag>` by
        default.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "80;90;100;120"
CXX_FLAGS = (
    "-std=c++20 -O3 -g1 -fPIC -fvisibility=hidden -pthread -Wall -Wextra -Wno-unused-parameter"
)


def find_nvcc() -> Path | None:
    """Returns nvcc from CUDA_HOME, the PATH, the usual place or a Python package, in that order."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    site_packages = Path(sysconfig.get_paths()["purelib"])
    candidates += sorted(site_packages.glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return next((path for path in candidates if path.exists()), None)


def choose_nvcc() -> Path | None:
    """Applies DATAEFF_CUDA to what is on the machine."""
    wish = os.environ.get("DATAEFF_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"DATAEFF_CUDA={wish!r} is not one of auto, 0, 1")
    if wish == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None and wish == "1":
        raise SystemExit(
            "DATAEFF_CUDA=1 but nvcc was not found in CUDA_HOME, on the PATH, in "
            "/usr/local/cuda/bin or among the Python packages: install the CUDA toolkit and point "
            "CUDA_HOME at it, pip install nvidia-cuda-nvcc (13.0 or later), or set DATAEFF_CUDA=0"
        )
    return nvcc


def gencode_flags(nvcc: Path) -> str:
    """Machine code for every architecture that this nvcc knows, and PTX for the last one."""
    wished = re.findall(r"\d+[a-z]?", os.environ.get("DATAEFF_CUDA_ARCHS", DEFAULT_CUDA_ARCHS))
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = set(re.findall(r"compute_(\d+)", listed.stdout))
    archs = [arch for arch in wished if arch.rstrip("af") in known]
    if not archs:
        raise SystemExit(
            f"DATAEFF_CUDA_ARCHS: {nvcc} compiles for none of {wished}, only for {sorted(known)}"
        )
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return " ".join(flags)


def stable_pybind11_include(build_dir: Path) -> Path:
    """Copies pybind11's headers beside the objects.

    An isolated build installs pybind11 in a fresh temporary folder each time; compiling against
    that path would change every command line and so rebuild every object.
    """
    import pybind11

    include = build_dir / f"pybind11-{pybind11.__version__}"
    if not include.exists():
        partial = include.with_suffix(f".{os.getpid()}")
        shutil.copytree(Path(pybind11.get_include()) / "pybind11", partial / "pybind11")
        partial.rename(include)
    return include


def ninja_file(target: str, build_dir: Path, nvcc: Path | None) -> str:
    """The build graph: one object per source under csrc/, linked into one module.

    Paths of what is built are relative to the folder that ninja runs in, so that a copy of the
    folder is as good as the folder, and objects are the same with CUDA and without where the
    source does not ask.
    """
    sources = sorted((ROOT / "csrc").rglob("*.cpp"))
    if nvcc:
        sources += sorted((ROOT / "csrc").rglob("*.cu"))
    # nvcc takes far longer per file than the host compiler, so its files start first.
    sources.sort(key=lambda path: path.suffix != ".cu")
    python_include = sysconfig.get_paths()["include"]
    pybind11_include = stable_pybind11_include(build_dir)
    includes = f"-I{ROOT / 'csrc'} -isystem {pybind11_include.name} -isystem {python_include}"
    cxx = os.environ.get("CXX", "c++")
    cxx_extra, link_extra = os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", "")
    # cudart's static symbols stay private: torch's own copy in the same process must not bind them.
    # The Python package of nvcc does not search its own lib/ for it.
    link = (
        f"{nvcc} -ccbin {cxx} -shared -cudart static -L{nvcc.parents[1] / 'lib'} "
        "-Xlinker --exclude-libs,ALL"
        if nvcc
        else f"{cxx} -shared -pthread {link_extra}"
    )
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        # The same objects wherever the sources lie: debug information names them from here.
        f"  command = {cxx} {CXX_FLAGS} -ffile-prefix-map={ROOT}=. $define {includes} {cxx_extra} "
        "-MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++ $in",
        "rule link",
        f"  command = {link} -o $out $in -ldl",
        "  description = link $out",
    ]
    if nvcc:
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -ccbin {cxx} -std=c++20 -O3 -lineinfo "
            f"-Xcompiler -fPIC,-fvisibility=hidden,-Wall {gencode_flags(nvcc)} "
            f"-I{ROOT / 'csrc'} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CUDA $in",
        ]
    objects = []
    for source in sources:
        obj = f"{source.relative_to(ROOT / 'csrc')}.o"
        objects.append(obj)
        lines.append(f"build {obj}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
        if nvcc and "DATAEFF_WITH_CUDA" in source.read_text():
            lines.append("  define = -DDATAEFF_WITH_CUDA=1")
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join([*lines, f"default {target}", ""])


class NinjaBuild(build_ext):
    """Compiles with ninja, in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Writes the ninja file, runs it, and copies the module to where setuptools wants it."""
        nvcc = choose_nvcc()
        default = ROOT / "build" / f"core-{sys.implementation.cache_tag}"
        build_dir = Path(os.environ.get("DATAEFF_BUILD_DIR", default))
        build_dir.mkdir(parents=True, exist_ok=True)
        built = build_dir / "_core.so"
        (build_dir / "build.ninja").write_text(ninja_file(built.name, build_dir, nvcc))
        subprocess.run([find_ninja(), "-C", str(build_dir)], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A rename, not a write in place: a process that has the old module mapped keeps its pages.
        partial = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(built, partial)
        partial.replace(target)


def find_ninja() -> str:
    """Ninja from its Python package, else from the PATH."""
    try:
        import ninja
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


def packages() -> list[str]:
    """Every package under dataeff/, and kernels/ under its installed name."""
    inits = sorted((ROOT / "dataeff").rglob("__init__.py"))
    names = [".".join(init.parent.relative_to(ROOT).parts) for init in inits]
    return [*names, "dataeff.kernels"]


setup(
    packages=packages(),
    package_dir={"dataeff.kernels": "kernels"},
    package_data={"dataeff": ["py.typed", "_core.pyi"]},
    ext_modules=[Extension("dataeff._core", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
