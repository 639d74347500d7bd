"""A layer in no paper: as a user types it, and as its formula in plain PyTorch.

For each edge a typed projection z of the source, and a gate from both ends; at a destination the
largest z beside the mean of what the gates let through, over one plus the number of edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dataeff import rgnn
from dataeff.bench.case import Step
from dataeff.bench.rgnn.handwritten import parameters
from dataeff.bench.rgnn.workload import Workload, require_memory


@rgnn.layer
def gated(g: Any, x: Any, W: Any, U: Any, c: Any) -> Any:
    """The layer in four lines of the language."""
    z = rgnn.tanh(rgnn.linear(g.src(x), W[g.etype]))
    gate = rgnn.sigmoid(rgnn.dot(rgnn.linear(g.dst(x), U), z) * c[g.etype])
    return rgnn.concat(g.max(z), g.mean(gate * z)) / (1.0 + g.in_degree())


class GatedConv(torch.nn.Module):
    """`gated` with parameters W [R, D, D / 2], U [D, D / 2] and c [R]; D features out."""

    def __init__(self, in_channels: int, out_channels: int, num_relations: int) -> None:
        super().__init__()
        half, scale = out_channels // 2, in_channels**-0.5
        self.W = Parameter(scale * torch.randn(num_relations, in_channels, half))
        self.U = Parameter(scale * torch.randn(in_channels, half))
        self.c = Parameter(torch.randn(num_relations))

    def forward(self, x: Tensor, graph: rgnn.Graph) -> Tensor:
        """Run the layer, [num_nodes, out_channels]."""
        out: Tensor = gated(graph, x, self.W, self.U, self.c)
        return out


def formula(work: Workload) -> Step:
    """The same in plain PyTorch: one `mm` per relation over its edges, and operators per edge."""
    copies = 12 if work.training else 5
    require_memory(
        copies * work.num_edges * work.dim * 2, "values per edge would take", work.x.device
    )
    order = torch.argsort(work.edges.edge_type, stable=True)
    (src, dst), kind = work.edges.edge_index[:, order], work.edges.edge_type[order]
    counts = kind.bincount(minlength=work.relations).tolist()
    degree = dst.bincount(minlength=work.nodes)[:, None].to(work.x.dtype)
    p = parameters(work)

    def forward(x: Tensor) -> Tensor:
        rows = x.index_select(0, src).split(counts)
        z = torch.tanh(torch.cat([part @ w for part, w in zip(rows, p["W"], strict=True)]))
        query = (x @ p["U"]).index_select(0, dst)
        gate = torch.sigmoid((query * z).sum(1) * p["c"].index_select(0, kind))
        width = z.shape[1]
        place = dst[:, None].expand(-1, width)
        most = z.new_zeros(work.nodes, width)
        most = most.scatter_reduce(0, place, z, "amax", include_self=False)
        total = z.new_zeros(work.nodes, width).index_add(0, dst, gate[:, None] * z)
        found: Tensor = torch.cat([most, total / degree.clamp(min=1)], 1) / (1 + degree)
        return found

    return work.step(forward, p)
