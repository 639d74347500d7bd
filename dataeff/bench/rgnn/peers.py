"""Layers of other libraries: PyTorch Geometric's, compiled and not, and DGL's on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dataeff.bench.case import Step, Unavailable
from dataeff.bench.dgl import import_dgl
from dataeff.bench.rgnn import typed
from dataeff.bench.rgnn.handwritten import mean_shares
from dataeff.bench.rgnn.workload import Workload, require_memory


def pyg(name: str, work: Workload) -> Step:
    """PyTorch Geometric's layer `name`."""
    conv = _pyg_layer(name, work)
    edges = work.edges
    if name == "HGTConv":
        by_type = typed.edge_index_dict(edges, work.relations)
        return work.step(typed.forward(conv, by_type, work), dict(conv.named_parameters()))
    return work.step(
        lambda x: conv(x, edges.edge_index, edges.edge_type), dict(conv.named_parameters())
    )


def compiled(name: str, work: Workload) -> Step:
    """PyTorch Geometric's layer `name` after torch.compile; its first call compiles."""
    layer, edges = _pyg_layer(name, work), work.edges
    conv = torch.compile(layer)

    def forward(x: Tensor) -> Tensor:
        found: Tensor = conv(x, edges.edge_index, edges.edge_type)
        return found

    return work.step(forward, dict(layer.named_parameters()))


def _pyg_layer(name: str, work: Workload) -> torch.nn.Module:
    from torch_geometric import nn

    if name == "RGCNConv":  # messages of one relation at a time, kept for backward together
        largest = int(work.edges.edge_type.bincount().max())
        rows = work.num_edges if work.training else largest
        rows += 3 * work.nodes * (work.relations if work.training else 1)
        require_memory(rows * work.dim * 4, "outputs per relation would take", work.x.device)
    elif name == "HGTConv":  # keys and values of every relation's source nodes, and of edges
        rows = 3 * work.num_edges + 2 * work.relations * work.nodes
        require_memory(
            rows * work.dim * 4, "keys and values per relation would take", work.x.device
        )
    else:
        copies = 4 if work.training else 2
        require_memory(
            copies * work.num_edges * work.dim**2 * 4, "a weight per edge would take", work.x.device
        )
    kinds: object = work.relations
    if name == "HGTConv":
        kinds = typed.metadata(work.edges, work.relations)
    conv: torch.nn.Module = getattr(nn, name)(work.dim, work.dim, kinds)
    conv = conv.to(work.x.device)
    conv.load_state_dict(work.state)
    return conv


def dgl(work: Workload) -> Step:
    """DGL's RelGraphConv with PyTorch Geometric's normalisation."""
    if work.x.is_cuda:
        raise Unavailable("the wheel of DGL that loads beside this torch is for CPUs")
    library = import_dgl()
    copies = 6 if work.training else 3
    require_memory(
        copies * work.num_edges * work.dim * 4, "messages per edge would take", work.x.device
    )
    src, dst = work.edges.edge_index
    graph = library.graph((src, dst), num_nodes=work.nodes)
    conv = library.nn.RelGraphConv(work.dim, work.dim, work.relations)
    ours = {"linear_r.W": "weight", "loop_weight": "root", "h_bias": "bias"}
    conv.load_state_dict({theirs: work.state[name] for theirs, name in ours.items()})
    share = mean_shares(work)[:, None]
    named = dict(conv.named_parameters())
    return work.step(
        lambda x: conv(graph, x, work.edges.edge_type, norm=share),
        {name: named[theirs] for theirs, name in ours.items()},
    )
