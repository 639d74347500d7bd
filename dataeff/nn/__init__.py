"""Drop-ins for relational layers of PyTorch Geometric, written in the language of `dataeff.rgnn`.

They take the same arguments, hold the same `state_dict` and compute the same results; `edge_index`
may also be an `rgnn.Graph`, whose index structures are then built once. `SimpleHGNConv` and
`CompGCNConv`, which have no such counterpart, follow their papers.
"""

from __future__ import annotations

from dataeff.nn.comp_gcn_conv import CompGCNConv
from dataeff.nn.convert import Conversion, convert, from_pyg
from dataeff.nn.hgt_conv import HGTConv
from dataeff.nn.rgat_conv import RGATConv
from dataeff.nn.rgcn_conv import RGCNConv
from dataeff.nn.simple_hgn_conv import SimpleHGNConv

__all__ = [
    "CompGCNConv",
    "Conversion",
    "HGTConv",
    "RGATConv",
    "RGCNConv",
    "SimpleHGNConv",
    "convert",
    "from_pyg",
]
