"""The graph inside a layer function: where values are read from, and what they are reduced to."""

from __future__ import annotations

from typing import Any, NoReturn

from dataeff.rgnn import domains
from dataeff.rgnn.symbols import (
    Argument,
    Symbol,
    TypeKey,
    Value,
    bring,
    emit,
    expect,
    first_rows,
    tracer_of,
    unary,
)
from dataeff.rgnn.tracer import Tracer


class _Vocabulary:
    """What is said of the graph: a word that is not there is answered with those that are."""

    _name = "g"

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer

    def __getattr__(self, word: str) -> NoReturn:
        if word.startswith("_") or word == "tracer":
            raise AttributeError(word)
        known = sorted(w for w in {*dir(type(self)), *vars(self)} if not w.startswith("_"))
        known = [w for w in known if w != "tracer"]
        raise self.tracer.error(f"there is no {self._name}.{word}; there are {', '.join(known)}")


class PerRelation(_Vocabulary):
    """`g.per_relation`: reductions of edge values to (destination, relation) pairs."""

    _name = "g.per_relation"

    def sum(self, value: Symbol) -> Value:
        """Sum over the edges of each pair."""
        return _reduce_along("sum", "edge.dst_pair", value, "g.per_relation.sum")

    def max(self, value: Symbol) -> Value:
        """Maximum over the edges of each pair."""
        return _reduce_along("max", "edge.dst_pair", value, "g.per_relation.max")

    def mean(self, value: Symbol) -> Value:
        """Mean over the edges of each pair."""
        return _mean_along("edge.dst_pair", value, "g.per_relation.mean")


class GraphSymbol(_Vocabulary):
    """What a layer function calls `g`."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self.etype = TypeKey(tracer, "etype")
        self.ntype = TypeKey(tracer, "ntype")
        self.per_relation = PerRelation(tracer)

    def node(self, value: Symbol) -> Value:
        """An argument as a value of the source nodes."""
        return _at_node(self.tracer, value, "g.node")

    def src(self, value: Symbol) -> Value:
        """Bring a node value to the edges that leave the node."""
        node = _at_node(self.tracer, value, "g.src")
        return emit(self.tracer, "gather", node.id, attrs=("edge.src",))

    def dst(self, value: Symbol) -> Value:
        """Bring a node value to the edges that enter the node."""
        found = _at_dst(self.tracer, value, "g.dst")
        return emit(self.tracer, "gather", found.id, attrs=("edge.dst",))

    def at_dst(self, value: Symbol) -> Value:
        """A node value at the destination nodes (of a block: its first rows)."""
        return _at_dst(self.tracer, value, "g.at_dst")

    def edge(self, value: Symbol) -> Value:
        """A value per edge, given in the order of `edge_index`."""
        if isinstance(value, Argument):
            return emit(self.tracer, "gather", value.at("given"), attrs=("edge.given",))
        return expect(self.tracer, value, ("edge",), "g.edge")

    def sum(self, value: Symbol) -> Value:
        """Sum an edge (or per-relation) value over each destination's edges (or relations)."""
        return _reduce_along("sum", _to_dst(self.tracer, value, "g.sum"), value, "g.sum")

    def max(self, value: Symbol) -> Value:
        """Maximum over each destination's edges; 0 where there are none."""
        return _reduce_along("max", _to_dst(self.tracer, value, "g.max"), value, "g.max")

    def mean(self, value: Symbol) -> Value:
        """Mean over each destination's edges; 0 where there are none."""
        return _mean_along(_to_dst(self.tracer, value, "g.mean"), value, "g.mean")

    def mean_per_relation(self, value: Symbol) -> Value:
        """Mean over each destination's edges of each relation, summed over relations."""
        return self.sum(_mean_along("edge.dst_pair", value, "g.mean_per_relation"))

    def in_degree(self) -> Value:
        """Number of edges that enter each destination."""
        return emit(self.tracer, "degree", attrs=("edge.dst",))

    def out_degree(self) -> Value:
        """Number of edges that leave each source node."""
        return emit(self.tracer, "degree", attrs=("edge.src",))

    def degree_norm(self) -> Value:
        """1 / sqrt(out-degree of the source x in-degree of the destination), for each edge."""
        product = self.src(self.out_degree()) * self.dst(self.in_degree())
        return 1.0 / unary("sqrt", product)


def _at_node(tracer: Tracer, symbol: Any, what: str) -> Value:
    if isinstance(symbol, Argument):
        return Value(tracer, symbol.at("node"))
    if isinstance(symbol, Value) and symbol.type.domain == "dst":
        raise tracer.error(
            f"{what} needs a node value, got {symbol.type}: what edges bring to destinations is"
            " read by g.dst; for a second hop return it, and call a layer with it"
        )
    return expect(tracer, symbol, ("node",), what)


def _at_dst(tracer: Tracer, symbol: Any, what: str) -> Value:
    if isinstance(symbol, Argument):
        value = Value(tracer, symbol.at(symbol.rows("dst")))
    else:
        value = expect(tracer, symbol, ("node", "dst"), what)
    return value if value.type.domain == "dst" else first_rows(tracer, value)


def _to_dst(tracer: Tracer, symbol: Any, what: str) -> str:
    value = expect(tracer, symbol, ("edge", "dst_pair"), what)
    return f"{value.type.domain}.dst"


def _reduce_along(kind: str, name: str, symbol: Any, what: str) -> Value:
    tracer = tracer_of(symbol)
    value = expect(tracer, symbol, (domains.map_source(name),), what)
    return emit(tracer, kind, value.id, attrs=(name,))


def _mean_along(name: str, symbol: Any, what: str) -> Value:
    total = _reduce_along("sum", name, symbol, what)
    tracer = total.tracer
    count = emit(tracer, "degree", attrs=(name,))
    one = bring(tracer, Value(tracer, tracer.const(1.0)), total.type.domain)
    # One division for a row and not one for each of its elements, as a count is no small number.
    share = emit(tracer, "div", one.id, emit(tracer, "maximum", count.id, one.id).id)
    return emit(tracer, "mul", total.id, share.id)
