"""Layers of papers in the layer language: what `dataeff rgnn build --layer` compiles.

Dimension letters: N nodes, T node types, R relations, I features in, H heads, D features of a head,
O = H * D features out. `dataeff.nn` holds the layers with parameters and options of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

from dataeff.rgnn.graph_symbol import GraphSymbol
from dataeff.rgnn.language import dot, edge_softmax, gelu, leaky_relu, linear, reshape
from dataeff.rgnn.layer import Layer, layer
from dataeff.rgnn.symbols import Argument, Value

Shapes = dict[str, tuple[int, ...]]


@layer
def rgcn(g: GraphSymbol, x: Argument, W: Argument, root: Argument, bias: Argument) -> Value:
    """Mean per relation, then a sum over relations (Schlichtkrull et al., arXiv 1703.06103)."""
    return g.mean_per_relation(linear(g.src(x), W[g.etype])) + linear(x, root) + bias


@layer
def rgat(g: GraphSymbol, x: Argument, W: Argument, a_src: Argument, a_dst: Argument) -> Value:
    """Additive attention over all relations (Busbridge et al., arXiv 1904.05811)."""
    z_src, z_dst = linear(g.src(x), W[g.etype]), linear(g.dst(x), W[g.etype])
    score = dot(z_src, a_src[g.etype]) + dot(z_dst, a_dst[g.etype])
    return g.sum(edge_softmax(leaky_relu(score, 0.2)) * z_src)


@layer
def hgt(
    g: GraphSymbol,
    x: Argument,
    K: Argument,
    Q: Argument,
    V: Argument,
    A: Argument,
    M: Argument,
    P: Argument,
) -> Value:
    """Attention with typed keys and messages (Hu et al., arXiv 2003.01332); A holds the scale."""
    key, query = linear(g.src(linear(x, K[g.ntype])), A[g.etype]), linear(x, Q[g.ntype])
    message = linear(g.src(linear(x, V[g.ntype])), M[g.etype])
    h = gelu(g.sum(edge_softmax(dot(key, g.dst(query))) * message))
    return linear(reshape(h, prod(h.type.shape)), P[g.ntype])


@layer
def simple_hgn(
    g: GraphSymbol,
    x: Argument,
    weight: Argument,
    relation: Argument,
    rel_weight: Argument,
    a_src: Argument,
    a_dst: Argument,
    a_rel: Argument,
    previous: Argument | None = None,
    keep: Argument | None = None,
    residual: Argument | None = None,
    *,
    slope: float,
    beta: float,
) -> tuple[Value, Value]:
    """Attention with relations in its scores (Lv et al., KDD 2021, arXiv 2112.14936)."""
    z = linear(g.node(x), weight)
    along = dot(linear(relation[g.etype], rel_weight), a_rel)
    score = g.dst(dot(z, a_dst)) + g.src(dot(z, a_src)) + along
    alpha = edge_softmax(leaky_relu(score, slope))
    if previous is not None:
        alpha = (1 - beta) * alpha + beta * g.edge(previous)
    out = g.sum(g.src(z) * (alpha if keep is None else alpha * g.edge(keep)))
    if residual is not None:
        out = out + linear(g.at_dst(x), residual)
    return out, alpha


@layer
def comp_gcn(
    g: GraphSymbol,
    x: Argument,
    relation: Argument,
    weight: Argument,
    loop: Argument,
    loop_weight: Argument,
    edge_weight: Argument | None = None,
    bias: Argument | None = None,
    *,
    composition: str,
    norm: bool,
) -> Value:
    """Nodes composed with relations (Vashishth et al., ICLR 2020, arXiv 1911.03082)."""

    def compose(rows: Any, relation: Any) -> Value:
        if composition == "corr":  # relation: its circulant matrix
            return linear(rows, relation)
        made: Value = rows * relation if composition == "mult" else rows - relation
        return made

    message = linear(compose(g.src(x), relation[g.etype]), weight[g.etype])
    message = message * g.degree_norm() if norm else message
    message = message if edge_weight is None else message * g.edge(edge_weight)
    out = g.sum(message) + linear(compose(g.at_dst(x), loop), loop_weight)
    return out if bias is None else out + bias


@dataclass(frozen=True)
class Published:
    """A layer, the shapes of its tensors, and what else it is called with.

    Attributes:
        layer: the layer.
        shapes: `shapes(N, T, R, I, H, D)`, by argument.
        statics: its other arguments.
        typed: meant for graphs made of edges by type, so that weights of node types and of
            relations may be multiplied with one another.
    """

    layer: Layer
    shapes: Callable[[int, int, int, int, int, int], Shapes]
    statics: dict[str, Any] = field(default_factory=dict)
    typed: bool = False


def _rgcn(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    return {"x": (n, i), "W": (r, i, h * d), "root": (i, h * d), "bias": (h * d,)}


def _rgat(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    return {"x": (n, i), "W": (r, i, h, d), "a_src": (r, h, d), "a_dst": (r, h, d)}


def _hgt(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    nodes, edges = dict.fromkeys("KQV", (t, i, h, d)), dict.fromkeys("AM", (r, h, d, d))
    return {"x": (n, i), **nodes, **edges, "P": (t, h * d, h * d)}


def _simple_hgn(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    shared = {"weight": (i, h, d), "relation": (r, d), "rel_weight": (d, h, d)}
    vectors = dict.fromkeys(("a_src", "a_dst", "a_rel"), (h, d))
    return {"x": (n, i), **shared, **vectors, "residual": (i, h, d)}


def _comp_gcn(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    weights = {"weight": (r, i, h * d), "loop": (i,), "loop_weight": (i, h * d)}
    return {"x": (n, i), "relation": (r, i), **weights, "bias": (h * d,)}


PUBLISHED = {
    "rgcn": Published(rgcn, _rgcn),
    "rgat": Published(rgat, _rgat),
    "hgt": Published(hgt, _hgt, typed=True),
    "simple_hgn": Published(simple_hgn, _simple_hgn, {"slope": 0.2, "beta": 0.05}),
    "comp_gcn": Published(comp_gcn, _comp_gcn, {"composition": "mult", "norm": True}),
}
