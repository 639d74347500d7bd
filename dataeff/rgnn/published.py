"""RGCN, RGAT and HGT in the layer language: what `dataeff rgnn build --layer` compiles.

Dimension letters: N nodes, T node types, R relations, I features in, H heads, D features of a head,
O = H * D features out. `dataeff.nn` holds the layers with parameters and options of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from dataeff.rgnn.language import (
    Argument,
    GraphSymbol,
    Value,
    dot,
    edge_softmax,
    gelu,
    leaky_relu,
    linear,
    reshape,
)
from dataeff.rgnn.layer import Layer, layer

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


@dataclass(frozen=True)
class Published:
    """A layer, and the shapes of its arguments: `shapes(N, T, R, I, H, D)`."""

    layer: Layer
    shapes: Callable[[int, int, int, int, int, int], Shapes]


def _rgcn(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    return {"x": (n, i), "W": (r, i, h * d), "root": (i, h * d), "bias": (h * d,)}


def _rgat(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    return {"x": (n, i), "W": (r, i, h, d), "a_src": (r, h, d), "a_dst": (r, h, d)}


def _hgt(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    nodes, edges = dict.fromkeys("KQV", (t, i, h, d)), dict.fromkeys("AM", (r, h, d, d))
    return {"x": (n, i), **nodes, **edges, "P": (t, h * d, h * d)}


PUBLISHED = {
    "rgcn": Published(rgcn, _rgcn),
    "rgat": Published(rgat, _rgat),
    "hgt": Published(hgt, _hgt),
}
