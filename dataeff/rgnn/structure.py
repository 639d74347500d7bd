"""Index structures of a graph: sorted edges, unique pairs, and every row map both ways.

For a map m from rows of domain B to rows of domain A there are two forms: `index` [B] gives m(b),
and `Segments` lists, for each a, the rows b with m(b) = a. Indices are int32 when every id fits.

Every index is in range whatever the ids were: the ids are checked before anything is looked up by
them. On a GPU that costs no wait of its own, for the number of pairs is waited for as well.

What is built at a call on one stream is found by calls on others, so it goes by a `StreamOrder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataeff.memory.stream_order import StreamOrder
from dataeff.rgnn import domains
from dataeff.rgnn.capture import refuse_capture
from dataeff.rgnn.long_rows import LongRows, Pieces, cut_hubs, list_long_rows
from dataeff.rgnn.sorting import Sorted, by_torch, count_ids, find_runs, rank_ids, sort_ids
from dataeff.rgnn.tilemap import TileMaps

if TYPE_CHECKING:
    from dataeff.rgnn.graph import Graph

# Maps that are made of two others, when they are asked for: compacted layers read few of them, and
# all together, with those of destinations and their pairs, would be half of what a graph takes.
# A layer that reads the sources of edges is not compacted by them: it does without their pairs.
_COMPOSED = {
    "edge.src": ("edge.src_pair", "src_pair.src"),
    "edge.etype": ("edge.src_pair", "src_pair.etype"),
}

# Maps whose index follows from their segments, and is made of them when it is asked for.
_NUMBERED = ("edge.dst", "edge.dst_pair", "edge.src_pair", "dst_pair.etype")

# No two pairs of a node have the same relation, and each has an edge of the node's.
_BY_RELATION = {"dst_pair.dst": "edge.dst", "src_pair.src": "edge.src"}

# Maps whose segments are ranges of rows: `Segments.items` is None for these and no others.
CONTIGUOUS = ("edge.dst", "edge.dst_pair", "src_pair.etype", "dst_pair.etype")

# A kernel counts on from a row number by a block of rows, or by those of one sum, before it asks
# whether that is the end; so the largest numbers are left free. See `GemmSchedule.chunk_rows`.
MOST_IN_INT32 = 2**31 - 2**24


@dataclass(frozen=True)
class Segments:
    """Rows `items[begin[a]:end[a]]` lead to row a; `items` is None when rows are in that order.

    Shapes: begin, end [rows of the target], items [rows of the source], all of one integer dtype.
    Rows of a segment have one fixed order, so a sum over it has one result.
    """

    begin: Tensor
    end: Tensor
    items: Tensor | None


@dataclass(frozen=True)
class TypedRows:
    """The rows of a domain type by type, for products with a matrix per type.

    Attributes:
        pointers: first row of each type and the end, [types + 1].
        order: the rows sorted by type, [rows]; None when they stand so.
        tiles: the tile maps of `pointers`.
    """

    pointers: Tensor
    order: Tensor | None
    tiles: TileMaps

    @cached_property
    def bounds(self) -> Tensor:
        """`pointers` as compiled C++ takes them, int64."""
        return self.pointers.to(torch.int64).contiguous()


class Structure:
    """What a `Graph` knows about its edges once they are sorted; internal to `dataeff.rgnn`.

    Args:
        graph: holds the ids.
        keep_order: values of edges are at hand, which are read in the order of the sort: without
            it edges are sorted once more when such values come.

    Raises:
        IndexError: an id of the graph is out of range; names it.
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, graph: Graph, keep_order: bool = False) -> None:
        refuse_capture(graph.device, "the sorted edges of a graph")
        self.graph = graph
        (src, dst), etype = graph.ids()
        self._on_gpu = by_torch(src)
        if not self._on_gpu:
            graph.validate()
        largest = max(
            graph.num_edges, graph.num_src_nodes, graph.num_dst_nodes, graph.num_relations
        )
        self.dtype = torch.int32 if largest <= MOST_IN_INT32 else torch.int64
        self._index: dict[str, Tensor] = {}
        self._asked: set[str] = set()  # whose index somebody was given
        self._segments: dict[str, Segments] = {}
        self._longest: dict[str, int] = {}
        self._long_rows: dict[str, LongRows] = {}
        self._hubs: dict[str, Pieces] = {}
        self._typed_rows: dict[tuple[str, int, str, int], TypedRows] = {}
        self._order = StreamOrder(graph.device)
        src = self._cast(src, graph.num_src_nodes)
        dst = self._cast(dst, graph.num_dst_nodes)
        etype = self._cast(etype, graph.num_relations)
        by_type, given = self._sort_edges(dst, etype)
        if keep_order:
            self._index["edge.given"] = given.order
        self._segments["edge.dst"] = _split(given.ptr, None)
        src, dst, etype = (ids.index_select(0, given.order) for ids in (src, dst, etype))
        runs_of_dst = self._build_dst_pairs(dst, etype)
        by_src, runs_of_src = self._build_src_pairs(src, etype)
        if self._on_gpu:
            sums = {"edge.dst": given.ptr, "edge.src": by_src}
            pairs = {"edge.dst_pair": runs_of_dst, "edge.src_pair": runs_of_src}
            self._check_ids([by_type.ptr, *sums.values()], sums | pairs)
        graph.drop_merged_ids()
        self._order.made()

    def __del__(self) -> None:
        if "_order" in self.__dict__:
            self._order.let_go()

    def _cast(self, ids: Tensor, limit: int) -> Tensor:
        if self._on_gpu and ids.dtype != self.dtype:
            ids = ids.clamp(-1, limit)  # or a wrong id might become a right one in fewer bits
        return ids.to(self.dtype).contiguous()

    def _sort_edges(self, dst: Tensor, etype: Tensor) -> tuple[Sorted, Sorted]:
        """The given edges by relation, and by destination and then relation."""
        by_type = sort_ids(etype, self.graph.num_relations)
        return by_type, sort_ids(dst, self.graph.num_dst_nodes, by_type.order)

    def _check_ids(self, pointers: Sequence[Tensor], segments: Mapping[str, Tensor]) -> None:
        """Sorted by a key, rows whose key is out of range are those that no pointer spans.

        How long the longest segment of some maps is comes with them, for no wait of its own.
        """
        ends = [pointer[k] for pointer in pointers for k in (0, -1)]
        some = {name: pointer for name, pointer in segments.items() if pointer.numel() > 1}
        longest = [pointer.diff().max() for pointer in some.values()]
        found = torch.stack(ends + longest).tolist()
        if found[: len(ends)] != [0, self.graph.num_edges] * len(pointers):
            self.graph.validate(again=True)
            raise IndexError("ids of the graph have changed while its index structures were built")
        self._longest = dict.fromkeys(segments, 0) | dict(
            zip(some, found[len(ends) :], strict=True)
        )

    def _build_dst_pairs(self, dst: Tensor, etype: Tensor) -> Tensor:
        """Pairs are runs of the sorted edges; they are renumbered by (relation, destination)."""
        runs = find_runs(dst, etype)
        self.num_dst_pairs = runs.a.numel()
        by_type, number = rank_ids(runs.b, self.graph.num_relations)
        order = by_type.order
        self._index["dst_pair.dst"] = runs.a.index_select(0, order)
        begin, end = (p.index_select(0, order) for p in (runs.ptr[:-1], runs.ptr[1:]))
        self._segments["edge.dst_pair"] = Segments(begin, end, None)
        self._segments["dst_pair.etype"] = _split(by_type.ptr, None)
        self._segments["dst_pair.dst"] = _split(count_ids(runs.a, self.graph.num_dst_nodes), number)
        return runs.ptr

    def _build_src_pairs(self, src: Tensor, etype: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs are runs of the edges in the order of (relation, source); edges by source."""
        by_src = sort_ids(src, self.graph.num_src_nodes)
        by_type = sort_ids(etype, self.graph.num_relations, by_src.order)
        edges = by_type.order
        runs = find_runs(etype, src, edges)
        self.num_src_pairs = runs.a.numel()
        self._index["edge.src_pair"] = runs.run_of
        self._index["src_pair.src"] = runs.b
        self._index["src_pair.etype"] = runs.a
        self._segments["edge.src_pair"] = _split(runs.ptr, edges)
        self._segments["edge.etype"] = _split(by_type.ptr, edges)
        return by_src.ptr, runs.ptr

    def index(self, name: str) -> Tensor:
        """For each row of the map's source, the row it leads to."""
        self._asked.add(name)
        return self._index_of(name)

    def _index_of(self, name: str) -> Tensor:
        """`index`, for maps that are made of this one."""
        if name not in self._index:
            found = self._build_index(name)
            self._order.made()
            self._index[name] = found
            # Kept where somebody was given it: replays of a captured CUDA graph may read it. And
            # another stream may still read it for a map that it has composed.
            given = "edge.src_pair" in self._asked or self._order.is_shared
            if name == "edge.src" and not given:
                self._index.pop("edge.src_pair", None)
        self._order.read()
        return self._index[name]

    def _build_index(self, name: str) -> Tensor:
        device = self.graph.device
        if name in _COMPOSED:
            refuse_capture(device, f"the index of {name}")
            first, second = (self._index_of(part) for part in _COMPOSED[name])
            return second.index_select(0, first)
        if name in _NUMBERED:
            refuse_capture(device, f"the index of {name}")
            return self._numbers_of_segments(name)
        if name == "edge.given":  # for values of edges alone
            refuse_capture(device, f"the index of {name}")
            (_, dst), etype = self.graph.ids()
            dst = self._cast(dst, self.graph.num_dst_nodes)
            etype = self._cast(etype, self.graph.num_relations)
            return self._sort_edges(dst, etype)[1].order
        if name not in ("node.ntype", "dst.ntype"):
            raise ValueError(f"map {name!r} has no index")
        types = self.graph.node_type
        if types is None:
            raise ValueError("the layer reads node types, but the graph has no node_type")
        refuse_capture(device, f"the index of {name}")
        self.graph.validate()
        rows = self.graph.num_rows(name.partition(".")[0])
        return self._cast(types[:rows], self.graph.num_node_types)

    def _numbers_of_segments(self, name: str) -> Tensor:
        """For each row, the segment that it stands in."""
        segments = self.segments(name)
        counts = segments.end - segments.begin
        rows = self.graph.num_rows(domains.map_source(name))
        if name == "edge.dst_pair":  # whose segments stand by destination, and not in their order
            number = self.segments("dst_pair.dst").items
            assert number is not None
            return torch.repeat_interleave(number, counts.index_select(0, number), output_size=rows)
        number = torch.repeat_interleave(counts, output_size=rows).to(self.dtype)
        if segments.items is None:
            return number
        found = torch.empty_like(number)
        found[segments.items] = number
        return found

    def segments(self, name: str) -> Segments:
        """For each row of the map's target, the rows that lead to it."""
        if name not in self._segments:
            refuse_capture(self.graph.device, f"the rows of {name}")
            found = self._build_segments(name)
            self._order.made()
            self._segments[name] = found
        self._order.read()
        return self._segments[name]

    def longest(self, name: str) -> int:
        """At most how many rows lead to one row of the map's target; waits for no GPU."""
        if name in self._longest:
            return self._longest[name]
        if not self._on_gpu:
            s = self.segments(name)
            self._longest[name] = int((s.end - s.begin).max()) if s.begin.numel() else 0
            return self._longest[name]
        if name == "edge.given":  # each edge is one of those given
            return min(self.graph.num_edges, 1)
        if name in _BY_RELATION:
            return min(self.graph.num_relations, self._longest[_BY_RELATION[name]])
        return self.graph.num_rows(domains.map_source(name))

    def long_rows(self, name: str, longer_than: int, at_most: int) -> LongRows | None:
        """Rows of the map's target that more than so many rows lead to.

        Those that more than `at_most` lead to are left to `hubs`. None without any.
        """
        if self.longest(name) <= longer_than:
            return None
        key = f"{name}>{longer_than}<={at_most}"
        if key not in self._long_rows:
            counts, items = self._counts(name, f"the long rows of {name}")
            rows = list_long_rows(counts, longer_than, at_most, items)
            self._order.made()
            self._long_rows[key] = rows
        self._order.read()
        return self._long_rows[key]

    def hubs(self, name: str, hub: int) -> Pieces | None:
        """Rows of the map's target that more than `hub` rows lead to, in pieces of as many.

        None without any.
        """
        if self.longest(name) <= hub:
            return None
        key = f"{name}/{hub}"
        if key not in self._hubs:
            counts, items = self._counts(name, f"the hubs of {name}")
            pieces = cut_hubs(counts, hub, items)
            self._order.made()
            self._hubs[key] = pieces
        self._order.read()
        return self._hubs[key]

    def _counts(self, name: str, what: str) -> tuple[Tensor, int]:
        """How many rows lead to each row of the map's target, and to all."""
        refuse_capture(self.graph.device, what)
        s = self.segments(name)
        return s.end - s.begin, self.graph.num_rows(domains.map_source(name))

    def typed_rows(
        self, key: tuple[str, int, str, int], build: Callable[[], TypedRows]
    ) -> TypedRows:
        """What was built for (domain, its rows, type domain, number of types).

        A layer may have weights for more types than the graph shows, so a graph keeps several.
        """
        if key not in self._typed_rows:
            refuse_capture(self.graph.device, f"the rows of {key[0]} by {key[2]}")
            rows = build()
            self._order.made()
            self._typed_rows[key] = rows
        self._order.read()
        return self._typed_rows[key]

    def _build_segments(self, name: str) -> Segments:
        ids = self.index(name)
        rows = self.graph.num_rows(domains.map_target(name))
        if name in CONTIGUOUS:  # sorted already
            return _split(count_ids(ids, rows), None)
        found = sort_ids(ids, rows)
        return _split(found.ptr, found.order)

    @property
    def nbytes(self) -> int:
        """Bytes of everything built so far."""
        parts = [*self._index.values()]
        parts += [part for long in self._long_rows.values() for part in (long.rows, long.count)]
        parts += [part for hubs in self._hubs.values() for part in (hubs.rows, hubs.first)]
        for s in self._segments.values():
            parts += [s.begin, s.end] if s.items is None else [s.begin, s.end, s.items]
        tile_maps = sum(rows.tiles.nbytes for rows in self._typed_rows.values())
        parts += [rows.pointers for rows in self._typed_rows.values()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}
        return sum(storages.values()) + tile_maps


def _split(ptr: Tensor, items: Tensor | None) -> Segments:
    return Segments(ptr[:-1], ptr[1:], items)
