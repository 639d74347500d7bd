"""`Indexed`: what compiled layers walk of a graph, built on its device when first asked for.

Edges are kept sorted by (destination, relation), so both a destination's edges and a (destination,
relation) pair's edges are contiguous. Pairs are numbered by relation first, so a typed product over
pairs needs no further sort.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from dataeff.rgnn.batched import is_transformed
from dataeff.rgnn.capture import refuse_capture
from dataeff.rgnn.profile import profile_of
from dataeff.rgnn.structure import Segments, Structure
from dataeff.rgnn.typed import TypedLayout
from dataeff.rgnn.view import SIZE_ORDER

if TYPE_CHECKING:
    from typing_extensions import Self

    from dataeff.rgnn.graph import Graph


class Indexed:
    """The sorted edges of a graph, its pairs of nodes and relations, and their numbers."""

    device: torch.device
    num_src_nodes: int
    num_dst_nodes: int
    num_edges: int
    num_relations: int
    num_node_types: int
    layout: TypedLayout | None

    def __init__(self) -> None:
        self._relation_ends: Tensor | None = None
        self._structure: Structure | None = None
        self._profile: str | None = None

    @property
    def structure(self) -> Structure:
        """Sorted edges and unique pairs, built at first use."""
        return self.sorted_for()

    def sorted_for(self, *values: Tensor) -> Structure:
        """`structure`, where it is not there yet built for a layer that is given these values."""
        if self._structure is None:
            of_edges = any(v.dim() and v.shape[0] == self.num_edges for v in values)
            with _outside_transforms():
                self._structure = Structure(cast("Graph", self), keep_order=of_edges)
        return self._structure

    @property
    def relation_ends(self) -> Tensor:
        """Node types of each relation's sources and of its destinations, [2, num_relations].

        Raises:
            ValueError: the graph was not made of edges by type.
        """
        if self.layout is None:
            raise ValueError("relations of this graph have no node types; see Graph.from_typed")
        if self._relation_ends is None:
            refuse_capture(self.device, "the node types of relations")
            self._relation_ends = self.layout.relation_ends(self.device)
        return self._relation_ends

    def prepare(self) -> Self:
        """Build the sorted edges and pairs now (before torch.compile traces a layer).

        Raises:
            RuntimeError: torch.compile traces this, of a graph that was not prepared before.
        """
        if not (torch.compiler.is_compiling() and self.profile):
            self._profile = profile_of(self.sizes)
        return self

    @property
    def profile(self) -> str:
        """The row counts that a `torch.compile`d program is made for; see `rgnn.profile`."""
        if self._profile is None:
            raise RuntimeError("call graph.prepare() before a torch.compile'd layer runs on it")
        return self._profile

    @property
    def num_src_pairs(self) -> int:
        """Distinct (source, relation) pairs."""
        return self.structure.num_src_pairs

    @property
    def num_dst_pairs(self) -> int:
        """Distinct (destination, relation) pairs."""
        return self.structure.num_dst_pairs

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each domain, in the order of `SIZE_ORDER`."""
        return (
            self.num_src_nodes,
            self.num_dst_nodes,
            self.num_edges,
            self.num_src_pairs,
            self.num_dst_pairs,
            self.num_relations,
            self.num_node_types,
        )

    def num_rows(self, domain: str) -> int:
        """Rows of a domain."""
        if domain == "one":
            return 1
        return self.sizes[SIZE_ORDER.index("edge" if domain == "given" else domain)]

    def index(self, name: str) -> Tensor:
        """For each row of the map's source, the row it leads to; [rows]."""
        return self.structure.index(name)

    def segments(self, name: str) -> Segments:
        """For each row of the map's target, the rows that lead to it."""
        return self.structure.segments(name)

    @property
    def src_pair_ratio(self) -> float:
        """Distinct (source, relation) pairs over edges: what compaction leaves to compute."""
        return self.num_src_pairs / max(self.num_edges, 1)

    @property
    def dst_pair_ratio(self) -> float:
        """Distinct (destination, relation) pairs over edges."""
        return self.num_dst_pairs / max(self.num_edges, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the index structures built so far."""
        return self._structure.nbytes if self._structure is not None else 0


def _outside_transforms() -> Any:
    """Index structures belong to the graph: torch.func would wrap what is made inside grad."""
    return temporarily_clear_interpreter_stack() if is_transformed() else contextlib.nullcontext()
