"""Reads Python files with `ast` into plain facts: what they define, import, call and name.

This file imports nothing but the standard library, so that it also runs as a script: `code_graph`
starts one process per core with `python python_facts.py`, and none of them pays for importing
torch. Such a process reads marshalled lists of paths and answers each with a marshalled list.
"""

from __future__ import annotations

import ast
import marshal
import sys
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

# One definition: kind ("module", "class", "function"), index of the definition that contains it
# (-1 for the module), its name, its docstring, and the dotted expressions it uses:
# decorators, bases (of a class), parameters (of a function), calls, references.
Definition = tuple[str, int, str, str, list[str], list[str], list[str], list[str], list[str]]
# One import: local alias, absolute or relative target, number of leading dots.
# The alias "*" stands for every public name of the target.
Import = tuple[str, str, int]
# The definitions of a file (the module itself is the first) and its imports; None: not Python.
Facts = tuple[list[Definition], list[Import]]

MAX_DOCSTRING = 400
_IGNORED_NAMES = frozenset({"self", "cls", "None", "True", "False", "_"})


def read_facts(source: bytes) -> Facts:
    """The facts of one file's bytes.

    Args:
        source: the bytes of a Python file, in the encoding that the file declares.

    Raises:
        SyntaxError: it is not Python of this version, or its encoding is unknown.
        ValueError: it holds a null byte.
        RecursionError: it nests too deeply to be walked.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old files hold invalid escapes; they are not ours to mend
        tree = ast.parse(source)
    reader = _Reader()
    reader.define("module", -1, "", tree)
    return reader.definitions, reader.imports


class _Reader:
    """Walks a syntax tree once; each use belongs to the innermost definition around it."""

    def __init__(self) -> None:
        self.definitions: list[Definition] = []
        self.imports: list[Import] = []

    def define(self, kind: str, parent: int, name: str, node: Any) -> None:
        docstring = (ast.get_docstring(node, clean=False) or "")[:MAX_DOCSTRING]
        decorators = [_dotted(_callee(d)) for d in getattr(node, "decorator_list", ())]
        bases = [_dotted(base) for base in getattr(node, "bases", ())]
        parameters = _parameters(node.args) if kind == "function" else []
        calls: list[str] = []
        references: list[str] = []
        index = len(self.definitions)
        self.definitions.append(
            (kind, parent, name, docstring, decorators, bases, parameters, calls, references)
        )
        used = _Uses({}, {})
        stack: list[Any] = _body(kind, node)[::-1]
        while stack:  # in source order
            stack += self._visit(stack.pop(), index, used)[::-1]
        calls += used.calls
        references += used.references

    def _visit(self, node: Any, owner: int, used: _Uses) -> list[Any]:
        """Notes what one syntax node says; returns the nodes below it that are still to visit."""
        kind = type(node)
        if kind is ast.Constant:
            return []
        if kind is ast.Name:
            if node.id not in _IGNORED_NAMES:
                used.references[node.id] = None
            return []
        if kind is ast.Attribute:
            used.references[_dotted(node)] = None
            return _unnamed_root(node)
        if kind is ast.Call:
            used.calls[_dotted(node.func)] = None
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            return _unnamed_root(node.func) + arguments
        if kind is ast.FunctionDef or kind is ast.AsyncFunctionDef:
            self.define("function", owner, node.name, node)
            return []
        if kind is ast.ClassDef:
            self.define("class", owner, node.name, node)
            return []
        if kind is ast.Import or kind is ast.ImportFrom:
            self.imports += _imports(node)
            return []
        return list(ast.iter_child_nodes(node))


@dataclass
class _Uses:
    """Dotted names as dictionaries without values: each once, in the order of their first use."""

    calls: dict[str, None]
    references: dict[str, None]


def _body(kind: str, node: Any) -> list[ast.AST]:
    if kind != "function":
        return list(node.body)
    defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None]
    annotations = [a.annotation for a in _arguments(node.args) if a.annotation is not None]
    returns = [node.returns] if node.returns is not None else []
    return [*node.body, *defaults, *annotations, *returns]


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    starred = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *starred]


def _parameters(arguments: ast.arguments) -> list[str]:
    return [a.arg for a in _arguments(arguments) if a.arg not in _IGNORED_NAMES]


def _callee(node: ast.AST) -> ast.AST:
    return node.func if isinstance(node, ast.Call) else node


def _unnamed_root(node: Any) -> list[ast.AST]:
    """The expression whose attribute is taken, e.g. `f(x)` of `f(x).shape`, unless it is a name."""
    while type(node) is ast.Attribute:
        node = node.value
    return [] if type(node) is ast.Name else [node]


def _dotted(node: Any) -> str:
    """`a.b.c` for attributes of a name, `.c` for one of anything else, else the empty string."""
    parts: list[str] = []
    while type(node) is ast.Attribute:
        parts.append(node.attr)
        node = node.value
    if type(node) is ast.Name:
        parts.append(node.id)
        return ".".join(reversed(parts))
    return "." + parts[0] if parts else ""


def _imports(node: ast.Import | ast.ImportFrom) -> list[Import]:
    if isinstance(node, ast.Import):
        # `import a.b` binds `a`, `import a.b as c` binds `a.b`; either way a.b is imported
        found = [(item.asname or "", item.name, 0) for item in node.names]
        return found + [(n.split(".")[0], n.split(".")[0], 0) for alias, n, _ in found if not alias]
    base = node.module or ""
    return [
        (
            item.asname or item.name,
            base if item.name == "*" else f"{base}.{item.name}".strip("."),
            node.level,
        )
        for item in node.names
    ]


def read_file(path: str) -> Facts | None:
    """The facts of a file, or None when it cannot be read as Python."""
    try:
        with open(path, "rb") as file:
            return read_facts(file.read())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError: too deep
        return None


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers each marshalled list of paths on `requests` with a list of facts, until it ends."""
    while True:
        try:
            paths = marshal.load(requests)
        except EOFError:
            return
        marshal.dump([read_file(path) for path in paths], answers)
        answers.flush()


if __name__ == "__main__":
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
