"""The layers of papers by name, as the modules here run them: `dataeff rgnn build --layer NAME`.

Dimension letters: N nodes, T node types, R relations, I features in, H heads, D features of a head,
O = H * D features out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dataeff.nn.comp_gcn_conv import comp_gcn
from dataeff.nn.hgt_conv import hgt
from dataeff.nn.rgat_conv import rgat
from dataeff.nn.rgcn_conv import rgcn
from dataeff.nn.simple_hgn_conv import simple_hgn
from dataeff.rgnn import Layer

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """A layer, the shapes of its tensors, and what else it is called with.

    Attributes:
        layer: the layer.
        shapes: `shapes(N, T, R, I, H, D)`, by argument.
        statics: its other arguments, `statics(H)`.
        typed: meant for graphs made of edges by type, so that weights of node types and of
            relations may be multiplied with one another.
    """

    layer: Layer
    shapes: Callable[[int, int, int, int, int, int], Shapes]
    statics: Callable[[int], dict[str, Any]] = lambda heads: {}
    typed: bool = False


def _rgcn(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    return {"x": (n, i), "weight": (r, i, h * d), "root": (i, h * d), "bias": (h * d,)}


def _rgat(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    scores = dict.fromkeys("qk", (h * d, h))
    return {"x": (n, i), "weight": (r, i, h * d), **scores, "bias": (h * d,)}


def _rgat_statics(heads: int) -> dict[str, Any]:
    attention = {"heads": heads, "dim": 1, "multiplicative": False, "within": False, "mod": None}
    return {**attention, "slope": 0.2, "blocks": 0, "aggr": "add", "need_attention": False}


def _hgt(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    nodes = {"K": (t, i, h, d), "bk": (t, h, d)}
    nodes |= {"Q": nodes["K"], "bq": nodes["bk"], "V": nodes["K"], "bv": nodes["bk"]}
    edges = {"attend": (r, h, d, d), "message": (r, h, d, d), "prior": (r, h)}
    skip = {"skip": (t,)} if i == h * d else {}
    return {"x": (n, i), **nodes, **edges, "out": (t, h * d, h * d), "bias": (t, h * d), **skip}


def _simple_hgn(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    shared = {"weight": (i, h, d), "relation": (r, d), "rel_weight": (d, h, d)}
    vectors = dict.fromkeys(("a_src", "a_dst", "a_rel"), (h, d))
    return {"x": (n, i), **shared, **vectors, "residual": (i, h, d)}


def _comp_gcn(n: int, t: int, r: int, i: int, h: int, d: int) -> Shapes:
    weights = {"weight": (r, i, h * d), "loop": (i,), "loop_weight": (i, h * d)}
    return {"x": (n, i), "relation": (r, i), **weights, "bias": (h * d,)}


PUBLISHED = {
    # Without blocks the rows have their width already: -1 leaves it.
    "rgcn": Published(rgcn, _rgcn, lambda heads: {"aggr": "mean", "width": -1}),
    "rgat": Published(rgat, _rgat, _rgat_statics),
    "hgt": Published(hgt, _hgt, typed=True),
    "simple_hgn": Published(simple_hgn, _simple_hgn, lambda heads: {"slope": 0.2, "beta": 0.05}),
    "comp_gcn": Published(comp_gcn, _comp_gcn, lambda heads: {"composition": "mult", "norm": True}),
}
