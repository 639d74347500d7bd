"""What a function of the code graph is to be recognised as: the package its file belongs to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataeff.data.name_resolution import SymbolTable
from dataeff.data.python_sources import module_fraction

TRAIN, VAL, TEST = 0, 1, 2
_TRAIN_SHARE, _VAL_SHARE = 0.7, 0.1


@dataclass(frozen=True)
class PackageLabels:
    """Labels and split of all definitions.

    Attributes:
        y: class, or -1, [num_definitions].
        split: TRAIN, VAL, TEST or -1, [num_definitions].
        class_names: sorted.
    """

    y: NDArray[np.int64]
    split: NDArray[np.int64]
    class_names: list[str]


def package_of(module: str) -> str:
    """The package that stands for a module: its first name, or two inside torch, which is large.

    `asyncio.events` is `asyncio`, `torch.nn.functional` is `torch.nn`.
    """
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "torch" else 1])


def label_packages(table: SymbolTable, min_files: int, seed: int) -> PackageLabels:
    """Labels the functions of every package with at least `min_files` files that define functions.

    The files of each class are shuffled by a seeded hash and cut into 70 % training, 10 %
    validation and 20 % test, at least one in each: a test function's file is never trained on.

    Raises:
        ValueError: fewer than two packages have that many files, or `min_files` is below 3.
    """
    if min_files < 3:
        raise ValueError(f"a class needs a file in each of three parts; min_files={min_files}")
    functions: defaultdict[int, list[int]] = defaultdict(list)
    for index, definition in enumerate(table.definitions):
        if definition.kind == "function":
            functions[definition.module].append(index)
    files: defaultdict[str, list[int]] = defaultdict(list)
    for module in functions:
        files[package_of(table.definitions[module].qualname)].append(module)
    class_names = sorted(name for name, modules in files.items() if len(modules) >= min_files)
    if len(class_names) < 2:
        raise ValueError(
            f"{len(class_names)} packages have {min_files} files or more among {len(functions)} "
            "files with functions, and a task needs two classes: raise scale or lower min_files"
        )
    y = np.full(len(table.definitions), -1, dtype=np.int64)
    split = np.full(len(table.definitions), -1, dtype=np.int64)
    for label, name in enumerate(class_names):
        modules = sorted(
            files[name], key=lambda m: module_fraction(table.definitions[m].qualname, seed + 1)
        )
        num_val = max(1, round(len(modules) * _VAL_SHARE))
        num_train = min(len(modules) - num_val - 1, max(1, round(len(modules) * _TRAIN_SHARE)))
        for position, module in enumerate(modules):
            part = (
                TRAIN if position < num_train else VAL if position < num_train + num_val else TEST
            )
            y[functions[module]] = label
            split[functions[module]] = part
    return PackageLabels(y, split, class_names)
