"""A package small enough that every edge of its graph can be written down."""

import pytest

from dataeff.data.python_sources import PythonSource

SHAPES = '''"""Shapes and areas."""
from __future__ import annotations
import abc
from .units import metre as m
from .units import *


class Shape(abc.ABC):
    """Has an area."""

    def area(self, scale):
        return scale * m(self.side())

    def side(self):
        return undefined_thing


@register
class Square(Shape):
    def side(self):
        return self.area(2)
'''
UNITS = """
def metre(value):
    def inner():
        return value
    return inner()


def register(cls):
    return cls
"""
INIT = "from .shapes import Square\n"


@pytest.fixture
def package(tmp_path):
    """Writes files and returns their sources: `package({"geo": text, "geo.shapes": text})`."""

    def write(files, packages=()):
        sources = []
        for module, text in files.items():
            path = tmp_path / f"{module}.py"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            sources.append(PythonSource(str(path), module, module in packages))
        return sources

    return write


@pytest.fixture
def geometry(package):
    files = {"geo": INIT, "geo.shapes": SHAPES, "geo.units": UNITS}
    return package(files, packages=("geo",))


@pytest.fixture
def zoo(package):
    """Three packages of five files; names and docstrings say to which package they belong."""
    files = {}
    for animal in ("falcon", "walrus", "ibex"):
        for i in range(5):
            files[f"{animal}.part{i}"] = f'''"""The {animal} module."""
import {animal}.part0
from {animal}.part1 import {animal}_feed_1


def {animal}_feed_{i}(food, {animal}=None):
    """Feeds a {animal.title()}, or two {animal}s: {animal.upper()}_FOOD."""
    return {animal}_feed_0(food)


class {animal.title()}Keeper:
    def walk(self):
        return feed{animal.title()}(self.walk, {animal})
'''
    return package(files)
