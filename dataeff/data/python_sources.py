"""Finds the Python files that every machine with torch has: the standard library's and torch's."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Tests say little about the code they sit in, and distributions differ in whether they ship them.
_SKIPPED_DIRECTORIES = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
)


@dataclass(frozen=True)
class PythonSource:
    """One Python file.

    Attributes:
        path: where it is.
        module: its dotted name, e.g. `torch.nn.functional`; a package's `__init__.py` has the
            package's name.
        is_package: whether it is an `__init__.py`.
    """

    path: str
    module: str
    is_package: bool


def find_sources(
    packages: Sequence[str] = ("torch",), scale: float = 1.0, seed: int = 0
) -> list[PythonSource]:
    """The files of the standard library and of `packages`, sorted by module name.

    Args:
        packages: installed packages to read beside the standard library. They are found, not
            imported.
        scale: share of the files to take, in (0, 1]. A smaller share is a subset of a larger one.
        seed: chooses which.

    Raises:
        ValueError: `scale` is not in (0, 1].
        ModuleNotFoundError: a package is not installed.
        FileNotFoundError: no file was found, as when the standard library is in a zip file.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale is the share of source files to take, in (0, 1]; got {scale}")
    found = dict(_walk(Path(sysconfig.get_path("stdlib")), ""))
    for package in packages:
        for root in package_directories(package):
            found.update(_walk(root, package))
    sources = [found[module] for module in sorted(found)]
    sources = [source for source in sources if module_fraction(source.module, seed) < scale]
    if not sources:
        raise FileNotFoundError(
            f"no Python file found under {sysconfig.get_path('stdlib')} or in {list(packages)} "
            f"at scale {scale}; a standard library in a zip file cannot be read: unpack it"
        )
    return sources


def package_directories(package: str) -> list[Path]:
    """The directories of an installed package, without importing it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"no installed package named {package!r} to read sources from")
    return [Path(location) for location in spec.submodule_search_locations]


def module_fraction(module: str, seed: int) -> float:
    """A number in [0, 1) drawn for a module by hashing its name: the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{module}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _walk(root: Path, package: str) -> Iterator[tuple[str, PythonSource]]:
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(
            d for d in subdirectories if d not in _SKIPPED_DIRECTORIES and d.isidentifier()
        )
        prefix = [package] if package else []
        prefix += Path(directory).relative_to(root).parts
        for file in sorted(files):
            stem, extension = os.path.splitext(file)
            if extension != ".py" or not stem.isidentifier():
                continue
            is_package = stem == "__init__"
            module = ".".join(prefix if is_package else [*prefix, stem])
            if module:
                yield module, PythonSource(os.path.join(directory, file), module, is_package)
