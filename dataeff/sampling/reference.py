"""What the sampler computes, one edge at a time in plain Python.

The definition that the core is compared with, bit for bit: it draws the same counter-based random
numbers (csrc/sampling/random.h) and knows nothing of threads, caches or hash maps.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from dataclasses import dataclass, field

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(z: int) -> int:
    """The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class Stream:
    """An indexed sequence of random numbers, and a family of further ones."""

    key: int

    def draw(self, i: int) -> int:
        """The `i`-th number, 64 random bits."""
        return mix64((self.key + _GOLDEN * (i + 1)) & _MASK)

    def fork(self, i: int) -> Stream:
        """The `i`-th sequence derived from this one."""
        return Stream(mix64(~(self.key + _GOLDEN * (i + 1)) & _MASK))

    def below(self, i: int, n: int) -> int:
        """Uniform in [0, n)."""
        return (self.draw(i) * n) >> 64

    def unit(self, i: int) -> float:
        """Uniform in (0, 1)."""
        return ((self.draw(i) >> 11) + 0.5) * 2.0**-53


def pick_distinct(stream: Stream, n: int, k: int) -> list[int]:
    """`k` < `n` distinct numbers below `n`: Floyd's algorithm (CACM 30(9), 1987)."""
    chosen: list[int] = []
    for i, last in enumerate(range(n - k, n)):
        entry = stream.below(i, last + 1)
        chosen.append(last if entry in chosen else entry)
    return chosen


def pick_distinct_weighted(stream: Stream, weights: list[float], k: int) -> list[int]:
    """The `k` smallest of -log(u) / weight (Efraimidis and Spirakis, IPL 97, 2006)."""
    keyed = [(-math.log(stream.unit(i)) / w, i) for i, w in enumerate(weights) if w > 0]
    return sorted(i for _, i in heapq.nsmallest(k, keyed))


def pick_weighted(stream: Stream, weights: list[float], k: int) -> list[int]:
    """`k` numbers with replacement, in proportion to `weights`."""
    cumulative = list(itertools.accumulate(weights))
    total = cumulative[-1]
    largest = math.nextafter(total, 0.0)
    return [bisect.bisect_right(cumulative, min(stream.unit(i) * total, largest)) for i in range(k)]


@dataclass
class Column:
    """The edges into one node: positions [begin, end) of the CSC arrays."""

    begin: int
    end: int

    def choose(
        self,
        stream: Stream,
        fanout: int,
        *,
        replace: bool = False,
        last: bool = False,
        weights: list[float] | None = None,
    ) -> list[int]:
        """Positions of the chosen edges, in the order of choice."""
        n = self.end - self.begin
        own = None if weights is None else weights[self.begin : self.end]
        available = n if own is None else sum(w > 0 for w in own)
        if available == 0 or fanout == 0:
            return []
        if own is not None:
            if replace and fanout > 0:
                picks = pick_weighted(stream, own, fanout)
            else:
                picks = pick_distinct_weighted(stream, own, n if fanout < 0 else fanout)
        elif last:
            picks = list(range(n))[-fanout if fanout > 0 else 0 :]
        elif fanout < 0 or (not replace and n <= fanout):
            picks = list(range(n))
        elif replace:
            picks = [stream.below(i, n) for i in range(fanout)]
        else:
            picks = pick_distinct(stream, n, fanout)
        return [self.begin + pick for pick in picks]


@dataclass
class Relation:
    """One CSC graph in Python lists, and how many edges to take per hop (and edge type)."""

    src_type: int
    dst_type: int
    colptr: list[int]
    row: list[int]
    fanouts: list[list[int]]
    e_id: list[int] | None = None
    etype: list[int] | None = None
    weights: list[float] | None = None
    times: list[int] | None = None

    def runs(self, node: int, hop: int, until: int | None) -> list[tuple[int | None, int, Column]]:
        """(edge type, fan-out, edges) for each part of the column that has a fan-out of its own."""
        begin, end = self.colptr[node], self.colptr[node + 1]
        if len(self.fanouts[hop]) == 1:
            if until is not None and self.times is not None:
                end = bisect.bisect_right(self.times, until, begin, end)
            return [(None, self.fanouts[hop][0], Column(begin, end))]
        assert self.etype is not None
        runs: list[tuple[int | None, int, Column]] = []
        for etype, group in itertools.groupby(range(begin, end), key=self.etype.__getitem__):
            positions = list(group)
            run = Column(positions[0], positions[-1] + 1)
            runs.append((etype, self.fanouts[hop][etype], run))
        return runs


@dataclass
class ReferenceSample:
    """Nodes by type as (tree, global id); edges by relation as (source, target, position)."""

    nodes: list[list[tuple[int, int]]]
    edges: list[list[tuple[int, int, int]]]
    nodes_per_hop: list[list[int]]
    edges_per_hop: list[list[int]] = field(default_factory=list)


def sample(
    relations: list[Relation],
    seeds: list[list[int]],
    random_seed: int,
    *,
    replace: bool = False,
    disjoint: bool = False,
    last: bool = False,
    induced: bool = False,
    seed_times: list[list[int]] | None = None,
) -> ReferenceSample:
    """Samples the neighbourhood of `seeds`, given per node type.

    Nodes are (tree, id) pairs; without `disjoint` every tree is 0, so that a node is found once.
    """
    trees = itertools.count() if disjoint else itertools.repeat(0)
    nodes = [[(next(trees), node) for node in ids] for ids in seeds]
    # The first place of a repeated seed is where edges lead to.
    local = [{key: i for i, key in reversed(list(enumerate(keys)))} for keys in nodes]
    times = list(itertools.chain.from_iterable(seed_times or []))
    out = ReferenceSample(
        nodes, [[] for _ in relations], [[len(ids)] for ids in seeds], [[] for _ in relations]
    )
    frontier = [range(len(ids)) for ids in seeds]
    root = Stream(mix64(random_seed % 2**64))
    for hop in range(len(relations[0].fanouts)):
        for r, relation in enumerate(relations):
            before = len(out.edges[r])
            for target in frontier[relation.dst_type]:
                tree, node = nodes[relation.dst_type][target]
                stream = root.fork(hop).fork(r).fork(node)
                if disjoint:
                    stream = stream.fork(tree)
                for etype, fanout, column in relation.runs(
                    node, hop, times[tree] if times else None
                ):
                    chosen = column.choose(
                        stream if etype is None else stream.fork(etype),
                        fanout,
                        replace=replace,
                        last=last and relation.times is not None,
                        weights=relation.weights,
                    )
                    for position in chosen:
                        key = (tree, relation.row[position])
                        known = local[relation.src_type]
                        if key not in known:
                            known[key] = len(nodes[relation.src_type])
                            nodes[relation.src_type].append(key)
                        out.edges[r].append((known[key], target, position))
            out.edges_per_hop[r].append(len(out.edges[r]) - before)
        for t, reached in enumerate(nodes):
            frontier[t] = range(frontier[t].stop, len(reached))
            out.nodes_per_hop[t].append(len(frontier[t]))
    if induced:
        out.edges = [_induced(relation, nodes, local) for relation in relations]
        out.edges_per_hop = [[len(edges)] for edges in out.edges]
    return out


def _induced(
    relation: Relation,
    nodes: list[list[tuple[int, int]]],
    local: list[dict[tuple[int, int], int]],
) -> list[tuple[int, int, int]]:
    """Every edge of `relation` whose both ends were sampled, in the same tree."""
    known = local[relation.src_type]
    return [
        (known[tree, relation.row[position]], target, position)
        for target, (tree, node) in enumerate(nodes[relation.dst_type])
        for position in range(relation.colptr[node], relation.colptr[node + 1])
        if (tree, relation.row[position]) in known
    ]
