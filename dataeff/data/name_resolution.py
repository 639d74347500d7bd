"""Finds what a dotted name in Python source stands for, as far as static names allow.

Followed: nesting of definitions, import aliases and re-exports, star imports, `self` and `cls` with
inherited methods. Not followed: values of variables. An attribute of an unknown value is matched
with the methods of that name, when these are few.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dataeff.data.python_facts import Facts
from dataeff.data.python_sources import PythonSource

KINDS = ("module", "class", "function")


@dataclass
class Definition:
    """One module, class or function; its number is its index in `SymbolTable.definitions`."""

    kind: str
    qualname: str
    name: str
    parent: int
    module: int
    docstring: str
    bases: list[str]
    children: dict[str, int] = field(default_factory=dict)


@dataclass
class ModuleScope:
    """What the imports of a module bind."""

    aliases: dict[str, str] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    imported: list[str] = field(default_factory=list)


class SymbolTable:
    """All definitions of some files, and the names that reach them.

    Args:
        sources: the files.
        facts: what each of them says, as from `read_facts`.
    """

    def __init__(self, sources: Sequence[PythonSource], facts: Sequence[Facts]) -> None:
        self.definitions: list[Definition] = []
        self.scopes: dict[int, ModuleScope] = {}
        self.first: list[int] = []  # of each file
        self._by_qualname: dict[str, int] = {}
        self._methods: defaultdict[str, list[int]] = defaultdict(list)
        self._absolute: dict[str, int | None] = {}
        for source, (definitions, imports) in zip(sources, facts, strict=True):
            module = len(self.definitions)
            self.first.append(module)
            self.scopes[module] = _scope(source, imports)
            for kind, parent, name, docstring, _, bases, *_ in definitions:
                self._add(
                    kind,
                    module + parent if parent >= 0 else -1,
                    name,
                    module,
                    docstring,
                    bases,
                    source,
                )

    def _add(
        self,
        kind: str,
        parent: int,
        name: str,
        module: int,
        docstring: str,
        bases: list[str],
        source: PythonSource,
    ) -> None:
        index = len(self.definitions)
        qualname = source.module if parent < 0 else f"{self.definitions[parent].qualname}.{name}"
        self.definitions.append(Definition(kind, qualname, name, parent, module, docstring, bases))
        self._by_qualname.setdefault(
            qualname, index
        )  # a later twin (if/else, overload) is another node
        if parent >= 0:
            self.definitions[parent].children.setdefault(name, index)
            if kind == "function" and self.definitions[parent].kind == "class":
                self._methods[name].append(index)

    def resolve(self, dotted: str, owner: int) -> int | None:
        """The definition that `dotted` stands for inside definition `owner`; None when unknown."""
        head, _, rest = dotted.partition(".")
        if head in ("self", "cls"):
            enclosing = self._enclosing_class(owner)
            return None if enclosing is None or "." in rest else self._member(enclosing, rest)
        found = self._lexical(head, owner) if head else None
        for name in rest.split(".") if rest else ():
            if found is None:
                return None
            found = self._member(found, name)
        return found

    def methods(self, name: str, at_most: int) -> list[int]:
        """The methods of that name, or none when there are more than `at_most`."""
        found = self._methods.get(name, [])
        return found if len(found) <= at_most else []

    def absolute(self, dotted: str) -> int | None:
        """The definition that an absolute name stands for, through re-exports."""
        if dotted in self._by_qualname:
            return self._by_qualname[dotted]
        if dotted not in self._absolute:
            self._absolute[dotted] = None  # stands while a circle of imports is followed
            prefix, _, last = dotted.rpartition(".")
            base = self.absolute(prefix) if prefix else None
            self._absolute[dotted] = None if base is None else self._member(base, last)
        return self._absolute[dotted]

    def _lexical(self, name: str, owner: int) -> int | None:
        module = self.definitions[owner].module
        scope = owner
        while scope >= 0:
            definition = self.definitions[scope]
            # the names of a class body are not seen from its methods
            if name in definition.children and (definition.kind != "class" or scope == owner):
                return definition.children[name]
            scope = definition.parent
        return self._imported(name, module)

    def _imported(self, name: str, module: int) -> int | None:
        scope = self.scopes[module]
        if name in scope.aliases:
            return self.absolute(scope.aliases[name])
        for star in scope.stars:
            found = self.absolute(f"{star}.{name}")
            if found is not None:
                return found
        return None

    def _member(self, owner: int, name: str) -> int | None:
        definition = self.definitions[owner]
        if name in definition.children:
            return definition.children[name]
        if definition.kind == "module":
            submodule = self._by_qualname.get(f"{definition.qualname}.{name}")
            return submodule if submodule is not None else self._imported(name, owner)
        if definition.kind == "class":
            for ancestor in self._ancestors(owner):
                if name in self.definitions[ancestor].children:
                    return self.definitions[ancestor].children[name]
        return None

    def _ancestors(self, index: int) -> list[int]:
        """The classes that a class inherits from, nearest first."""
        found: dict[int, None] = {index: None}
        queue = [index]
        while queue:
            definition = self.definitions[queue.pop(0)]
            for base in definition.bases:
                parent = self.resolve(base, definition.parent) if base else None
                if (
                    parent is not None
                    and parent not in found
                    and self.definitions[parent].kind == "class"
                ):
                    found[parent] = None
                    queue.append(parent)
        return list(found)[1:]

    def _enclosing_class(self, index: int) -> int | None:
        while index >= 0 and self.definitions[index].kind != "class":
            index = self.definitions[index].parent
        return index if index >= 0 else None


def _scope(source: PythonSource, imports: list[tuple[str, str, int]]) -> ModuleScope:
    scope = ModuleScope()
    for alias, target, level in imports:
        parts = source.module.split(".")
        # one dot is the package itself: an __init__ is already there, a module steps up once
        keep = len(parts) - level + (1 if source.is_package else 0)
        absolute = ".".join([*parts[:keep], target]).strip(".") if level else target
        if alias == "*":
            scope.stars.append(absolute)
        elif alias:
            scope.aliases.setdefault(alias, absolute)
        scope.imported.append(absolute)
    return scope
