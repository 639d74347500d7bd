"""A compiler for relational GNN layers (after Hector, arXiv 2301.06284).

A layer is a few lines of Python over a symbolic graph; forward and backward become fused kernels.
"""

from __future__ import annotations

from dataeff.rgnn import operators  # noqa: F401  (implements torch.ops.dataeff.rgnn_*)
from dataeff.rgnn.graph import Graph
from dataeff.rgnn.language import (
    concat,
    dot,
    edge_softmax,
    exp,
    gelu,
    leaky_relu,
    linear,
    log,
    outer,
    positive,
    relu,
    reshape,
    sigmoid,
    split,
    sqrt,
    tanh,
)
from dataeff.rgnn.layer import Layer, layer
from dataeff.rgnn.tracer import LayerTypeError
from dataeff.rgnn.tune import Tuning, tune

__all__ = [
    "Graph",
    "Layer",
    "LayerTypeError",
    "Tuning",
    "concat",
    "dot",
    "edge_softmax",
    "exp",
    "gelu",
    "layer",
    "leaky_relu",
    "linear",
    "log",
    "outer",
    "positive",
    "relu",
    "reshape",
    "sigmoid",
    "split",
    "sqrt",
    "tanh",
    "tune",
]
