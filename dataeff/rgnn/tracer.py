"""Tracing state: the program so far, what each argument turned out to be, and where the user is."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Attr, Builder, IRTypeError, Type

_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.join(os.path.dirname(os.path.abspath(torch.__file__)), "")


class LayerTypeError(TypeError, ValueError):
    """A layer function used an operation on values it does not fit; the message has the line.

    A tensor of a wrong width is found here too, so that it is a `ValueError` as well.
    """


@dataclass(frozen=True)
class RowCounts:
    """Rows that decide what an argument can be."""

    node: int
    dst: int
    edge: int
    relations: int
    node_types: int

    def of(self, domain: str) -> int:
        """Rows of a domain that an argument may stand in."""
        return {
            "node": self.node,
            "dst": self.dst,
            "given": self.edge,
            "etype": self.relations,
            "ntype": self.node_types,
        }[domain]


class Tracer:
    """Builds a program while a layer function runs on symbols.

    Args:
        shapes: shape of each tensor argument, by name.
        rows: row counts of the graph.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], rows: RowCounts) -> None:
        self.builder = Builder()
        self.shapes = shapes
        self.rows = rows
        self.domains: dict[str, str] = {}
        self._inputs: dict[str, int] = {}
        self._where: dict[str, str] = {}

    def error(self, message: str) -> LayerTypeError:
        """An error that points at the user's line."""
        return LayerTypeError(f"{user_line()}\n  {message}")

    def emit(self, kind: str, *args: int, attrs: Sequence[Attr] = ()) -> int:
        """Append an operation; type errors name the user's line and both operands."""
        try:
            return self.builder.emit(kind, *args, attrs=attrs, line=user_line())
        except IRTypeError as error:
            raise self.error(f"{kind}: {error}{self._perhaps_rows(args)}") from None

    def _perhaps_rows(self, args: Sequence[int]) -> str:
        """What an error adds where a parameter has as many rows as nodes or edges have."""
        readers = {
            "g.at_dst": self.rows.dst, "g.src": self.rows.node, "g.edge": self.rows.edge
        }  # fmt: skip
        for op in (self.builder[a] for a in args):
            given = self.builder[op.args[0]] if op.kind == "gather" else op
            if given.kind != "input" or given.type.domain != "one":
                continue
            name, rows = given.attrs[0], given.type.shape[:1]
            if found := [f"{reader}({name})" for reader, n in readers.items() if rows == (n,)]:
                return (
                    f"; argument {name} stands on its own here, as a parameter that is the same"
                    f" for every row, and {' or '.join(found)} reads a row of it each"
                )
        return ""

    def const(self, value: float) -> int:
        """A number."""
        return self.builder.emit("const", attrs=(value,), type=Type("one"), line=user_line())

    def known(self, name: str) -> int | None:
        """The input operation of an argument that has been used before."""
        return self._inputs.get(name)

    def node_domain(self, name: str, role: str) -> str:
        """`node`, or `dst` for an argument with as many rows as the block has destinations."""
        if name in self.domains:
            return self.domains[name]
        shape = self.shapes[name]
        rows = shape[0] if shape else -1
        return (
            "dst" if role == "dst" and rows != self.rows.node and rows == self.rows.dst else "node"
        )

    def resolve(self, name: str, domain: str) -> int:
        """Fix the domain of an argument and return its input operation.

        Raises:
            LayerTypeError: it was used in another domain before.
            ValueError: its number of rows is not the domain's.
        """
        if name in self.domains:
            if self.domains[name] != domain:
                raise self.error(
                    f"argument {name} is used as {domains.a_value(domain)} here, but as"
                    f" {domains.a_value(self.domains[name])} at {self._where[name]}"
                )
            return self._inputs[name]
        shape = self.shapes[name]
        if domain != "one":
            self._check_rows(name, shape, domain)
        kind = Type(domain, shape if domain == "one" else shape[1:])
        self.domains[name] = domain
        self._where[name] = user_line()
        self._inputs[name] = self.builder.emit("input", attrs=(name,), type=kind, line=user_line())
        return self._inputs[name]

    def _check_rows(self, name: str, shape: tuple[int, ...], domain: str) -> None:
        limit = self.rows.of(domain)
        enough = (
            len(shape) > 0 and shape[0] >= limit
            if domain in ("etype", "ntype")
            else len(shape) > 0 and shape[0] == limit
        )
        if not enough:
            at_least = "at least " if domain in ("etype", "ntype") else ""
            of_dst = domain == "node" and shape[:1] == (self.rows.dst,)
            remedy = f"; g.at_dst({name}) and g.dst({name}) read a row of each destination"
            raise ValueError(
                f"{user_line()}\n  argument {name} has shape {list(shape)}, but as"
                f" {domains.a_value(domain)} it needs {at_least}{limit} rows"
                + (remedy if of_dst else "")
            )


def user_line() -> str:
    """`file:line: source` of the innermost frame outside the compiler and torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    name, number = frame.f_code.co_filename, frame.f_lineno
    return f"{os.path.basename(name)}:{number}: {linecache.getline(name, number).strip()}"


def _is_ours(filename: str) -> bool:
    path = os.path.abspath(filename)
    return os.path.dirname(path) == _HERE or path.startswith(_TORCH)
