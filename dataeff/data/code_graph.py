"""The code graph of the installed Python: definitions and names, and how they use each other.

Real relational data that every machine has. Nodes are the modules, classes and functions of the
standard library and of torch, and the identifiers they share; relations are what the source says
(contains, imports, inherits, calls, decorates, refers to, takes as parameter) and their inverses.
The task is to tell from which package a function comes, for files never seen in training.

What would give the answer away is withheld: package and module names are no feature, and every word
of a class name is masked in all names and docstrings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataeff.data.facts_pool import read_files
from dataeff.data.name_resolution import KINDS, SymbolTable
from dataeff.data.package_labels import label_packages
from dataeff.data.python_facts import Facts
from dataeff.data.python_sources import PythonSource, find_sources
from dataeff.data.text_features import WordMask, hashed_ngrams

NODE_TYPES = (*KINDS, "name")
_FORWARD = ("contains", "imports", "inherits", "calls", "decorates", "refers_to", "takes")
RELATIONS = (*_FORWARD, *(f"{relation}^-1" for relation in _FORWARD))

_MAX_CANDIDATES = 4  # methods of one name that an unknown receiver may mean
_MIN_NAME_USERS = 2  # a name used by one definition joins nothing

Edge = tuple[int, int, int]  # source, target, relation
# Name nodes are numbered from -1 down until all definitions are known.


@dataclass(frozen=True)
class CodeGraph:
    """A relational graph with features, labels and a split.

    Attributes:
        edge_index: source and target of each edge, [2, num_edges], int64; sorted by target.
        edge_type: index into `RELATIONS`, [num_edges], int64.
        node_type: index into `NODE_TYPES`, [num_nodes], int64.
        x: hashed n-grams of names and docstrings, [num_nodes, dim], float32, rows of length 1 or 0.
        y: index into `class_names`, or -1 for nodes that are no function of a class, [num_nodes].
        split: 0 training, 1 validation, 2 test, -1 unlabelled, [num_nodes], int8. Functions of one
            file are all in one part.
        node_names: qualified names, for people: they are no feature.
        class_names: packages.
        masked_words: the words left out of all features.
        num_files: files read.
        num_skipped: files that are not Python of this version.
    """

    edge_index: Tensor
    edge_type: Tensor
    node_type: Tensor
    x: Tensor
    y: Tensor
    split: Tensor
    node_names: list[str]
    class_names: list[str]
    masked_words: frozenset[str]
    num_files: int
    num_skipped: int

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.node_names)

    @property
    def num_edges(self) -> int:
        """Number of edges, inverses included."""
        return self.edge_type.numel()

    @property
    def num_relations(self) -> int:
        """Number of relations, inverses included."""
        return len(RELATIONS)

    def nodes_of(self, part: str) -> Tensor:
        """The labelled functions of `train`, `val` or `test`, ascending, [n], int64."""
        return (self.split == ("train", "val", "test").index(part)).nonzero().flatten()


def build_code_graph(
    sources: Sequence[PythonSource] | None = None,
    *,
    scale: float = 1.0,
    dim: int = 256,
    seed: int = 0,
    min_files: int = 8,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CodeGraph:
    """Parses Python files into a graph; the same files and seed give the same graph.

    Args:
        sources: the files; those of the standard library and torch unless given.
        scale: share of these files to take, in (0, 1].
        dim: width of the features.
        seed: chooses the files at `scale` below 1, and the split.
        min_files: a package with fewer files is no class.
        num_workers: processes that parse; 0 parses in this one.
        progress: called with (files parsed, files).

    Raises:
        ValueError: `scale` is out of range, or no package has enough files to be a class.
    """
    if sources is None:
        sources = find_sources(scale=scale, seed=seed)
    read = read_files([source.path for source in sources], num_workers, progress)
    pairs = [(s, f) for s, f in zip(sources, read, strict=True) if f is not None]
    facts = [f for _, f in pairs]
    table = SymbolTable([s for s, _ in pairs], facts)
    labels = label_packages(table, min_files=min_files, seed=seed)
    names, edges = _edges(table, facts)
    num_nodes = len(table.definitions) + len(names)
    mask = WordMask(labels.class_names)
    x = hashed_ngrams(list(_texts(table, names, mask)), dim)
    edge_index, edge_type = _with_inverses(edges)
    kinds = [KINDS.index(definition.kind) for definition in table.definitions]
    return CodeGraph(
        edge_index=torch.from_numpy(edge_index),
        edge_type=torch.from_numpy(edge_type),
        node_type=torch.tensor(kinds + [len(KINDS)] * len(names)),
        x=torch.from_numpy(x),
        y=_padded(labels.y, num_nodes),
        split=_padded(labels.split, num_nodes).to(torch.int8),
        node_names=[definition.qualname for definition in table.definitions] + names,
        class_names=labels.class_names,
        masked_words=mask.words,
        num_files=len(pairs),
        num_skipped=len(sources) - len(pairs),
    )


def _edges(table: SymbolTable, facts: Sequence[Facts]) -> tuple[list[str], NDArray[np.int64]]:
    """The shared names, and all forward edges, [num_edges, 3]."""
    number: dict[str, int] = {}
    edges = np.array(list(_uses(table, facts, number)), dtype=np.int64).reshape(-1, 3)
    edges = np.unique(edges[edges[:, 0] != edges[:, 1]], axis=0)
    ends = edges[:, :2]
    pairs = np.unique(np.sort(ends[(ends < 0).any(axis=1)], axis=1), axis=0)  # (name, its user)
    uses = Counter(pairs[:, 0].tolist())
    names = [name for name, n in number.items() if uses[n] >= _MIN_NAME_USERS]
    final = np.full(len(number) + 1, -1, dtype=np.int64)
    for i, name in enumerate(names):
        final[-number[name]] = len(table.definitions) + i
    edges[:, :2] = np.where(ends < 0, final[np.maximum(-ends, 0)], ends)
    return names, edges[(edges[:, :2] >= 0).all(axis=1)]


def _uses(table: SymbolTable, facts: Sequence[Facts], number: dict[str, int]) -> Iterator[Edge]:
    """Each use as an edge; names that stand for no definition are numbered as they come."""
    contains, imports, inherits, calls, decorates, refers, takes = range(len(_FORWARD))

    def name_node(dotted: str) -> int:
        return number.setdefault(dotted.rpartition(".")[2], -len(number) - 1)

    def targets(dotted: str, owner: int, methods: bool = False) -> list[int]:
        if not dotted:
            return []
        found = table.resolve(dotted, owner)
        if found is not None:
            return [found]
        candidates = table.methods(dotted.rpartition(".")[2], _MAX_CANDIDATES) if methods else []
        return candidates if candidates and "." in dotted else [name_node(dotted)]

    for first, (definitions, _) in zip(table.first, facts, strict=True):
        for target in table.scopes[first].imported:
            found = table.absolute(target)
            yield first, name_node(target) if found is None else found, imports
        for i, (_, parent, _, _, decorators, bases, parameters, called, referred) in enumerate(
            definitions
        ):
            node, outer = first + i, first + max(parent, 0)
            if parent >= 0:
                yield outer, node, contains
            yield from ((t, node, decorates) for d in decorators for t in targets(d, outer))
            yield from ((node, t, inherits) for b in bases for t in targets(b, outer))
            yield from ((node, t, calls) for c in called for t in targets(c, node, methods=True))
            yield from ((node, t, refers) for r in referred for t in targets(r, node))
            yield from ((node, name_node(p), takes) for p in parameters)


def _with_inverses(edges: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    inverse = edges[:, [1, 0, 2]] + np.array([0, 0, len(_FORWARD)])
    both = np.concatenate([edges, inverse])
    order = np.lexsort((both[:, 2], both[:, 0], both[:, 1]))
    both = both[order]
    return np.ascontiguousarray(both[:, :2].T), np.ascontiguousarray(both[:, 2])


def _texts(table: SymbolTable, names: Sequence[str], mask: WordMask) -> Iterator[list[str]]:
    """The words of each node: never of a module's or package's name."""
    for definition in table.definitions:
        module = table.definitions[definition.module].qualname
        local = definition.qualname[len(module) :]
        yield mask(f"{local} {definition.docstring}")
    for name in names:
        yield mask(name)


def _padded(values: NDArray[np.int64], num_nodes: int) -> Tensor:
    padded = torch.full((num_nodes,), -1, dtype=torch.int64)
    padded[: len(values)] = torch.from_numpy(values)
    return padded
