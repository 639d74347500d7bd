"""What a careful user writes by hand on plain PyTorch: the same layers without a compiler.

`aten`: pairs (source, relation) made unique and sorted by relation once; one `mm` per relation over
them; the sum over edges as a sparse CSR product, whose transpose is kept for backward. `grouped`:
edges sorted by relation, one `torch.nn.functional.grouped_mm`, `index_add`.
"""

from __future__ import annotations

import warnings
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dataeff.bench.case import Step, Unavailable
from dataeff.bench.rgnn.datasets import Edges
from dataeff.bench.rgnn.workload import Workload, require_memory


class Pairs:
    """Edges, and their unique (node, relation) pairs by relation; `sizes` are the edges of each."""

    def __init__(self, node: Tensor, edge_type: Tensor, nodes: int, relations: int) -> None:
        key, self.of_edge, self.sizes = torch.unique(
            edge_type * nodes + node, return_inverse=True, return_counts=True
        )
        self.node, self.relation = key % nodes, key // nodes
        bounds = torch.arange(relations + 1, device=node.device) * nodes
        self.counts = torch.searchsorted(key, bounds).diff().tolist()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x[node] @ weight[relation], one product per relation, [pairs, out]."""
        # `split`: backward of a slice per relation would write a gradient of all rows for each.
        parts = zip(x.index_select(0, self.node).split(self.counts), weight, strict=True)
        return torch.cat([rows @ w for rows, w in parts])


class Spread:
    """Sums over edges as products with a sparse matrix [destinations, pairs]."""

    def __init__(self, dst: Tensor, column: Tensor, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.order = torch.argsort(dst * shape[1] + column)
        self.back = torch.argsort(column * shape[0] + dst)
        self.row, self.column = dst, column
        self.ptr = _pointers(dst[self.order], shape[0])
        self.back_ptr = _pointers(column[self.back], shape[1])
        with warnings.catch_warnings():  # torch says once that these are in beta state
            warnings.simplefilter("ignore", UserWarning)
            self.matrix(torch.ones_like(dst))

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix with these values per edge."""
        order = self.order
        return torch.sparse_csr_tensor(self.ptr, self.column[order], values[order], self.shape)

    def transposed(self, values: Tensor) -> Tensor:
        """Its transpose."""
        shape, back = self.shape[::-1], self.back
        return torch.sparse_csr_tensor(self.back_ptr, self.row[back], values[back], shape)


class _SparseProduct(torch.autograd.Function):
    """matrix(values) @ z, with gradients in both."""

    @staticmethod
    def forward(ctx: Any, spread: Spread, values: Tensor, z: Tensor) -> Tensor:
        ctx.spread = spread
        ctx.save_for_backward(values, z)
        return spread.matrix(values) @ z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor]:
        values, z = ctx.saved_tensors
        spread, dy = ctx.spread, grads[0].contiguous()
        dvalues = None
        if ctx.needs_input_grad[1]:
            dvalues = (dy[spread.row] * z[spread.column]).sum(1)
        return None, dvalues, spread.transposed(values) @ dy


class _Prepared:
    """What both layers need of a graph, each part made when first asked for."""

    def __init__(self, edges: Edges, nodes: int, relations: int) -> None:
        (self.src, self.dst), self.relation = edges.edge_index, edges.edge_type
        self.nodes, self.relations = nodes, relations

    @cached_property
    def sources(self) -> Pairs:
        return Pairs(self.src, self.relation, self.nodes, self.relations)

    @cached_property
    def targets(self) -> Pairs:
        return Pairs(self.dst, self.relation, self.nodes, self.relations)

    @cached_property
    def spread(self) -> Spread:
        shape = (self.nodes, self.sources.node.numel())
        return Spread(self.dst, self.sources.of_edge, shape)

    @cached_property
    def mean_shares(self) -> Tensor:
        shares: Tensor = (1.0 / self.targets.sizes)[self.targets.of_edge]
        return shares


# Cases that follow one another have the graph in common.
_prepared = lru_cache(maxsize=1)(_Prepared)


def aten(work: Workload) -> Step:
    """Compaction, one `mm` per relation, sparse products."""
    dst = work.edges.edge_index[1]
    prepared = _prepared(work.edges, work.nodes, work.relations)
    sources, spread = prepared.sources, prepared.spread
    p = parameters(work)
    rows = sources.node.numel() * (2 if work.model == "RGATConv" else 1)
    copies = 4 if work.training else 2  # gathered rows, products, and their gradients
    require_memory(copies * rows * work.dim * 4, "products per pair would take", work.x.device)

    if work.model == "RGCNConv":
        share = prepared.mean_shares

        def forward(x: Tensor) -> Tensor:
            z = sources.product(x, p["weight"])
            return _sparse_product(spread, share, z) + x @ p["root"] + p["bias"]

        return work.step(forward, p)
    targets = prepared.targets

    def attention(x: Tensor) -> Tensor:
        z = sources.product(x, p["weight"])
        query = targets.product(x, p["weight"] @ p["q"])
        score = query.index_select(0, targets.of_edge) + (z @ p["k"]).index_select(
            0, sources.of_edge
        )
        alpha = softmax(F.leaky_relu(score[:, 0], 0.2), dst, work.nodes)
        return _sparse_product(spread, alpha, z) + p["bias"]

    return work.step(attention, p)


def grouped(work: Workload) -> Step:
    """Edges sorted by relation, and one grouped product."""
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("this torch has no torch.nn.functional.grouped_mm")
    rows_per_edge = (3 if work.model == "RGCNConv" else 5) * (2 if work.training else 1)
    require_memory(
        rows_per_edge * work.num_edges * work.dim * 4, "products per edge would take", work.x.device
    )
    order = torch.argsort(work.edges.edge_type, stable=True)
    src, dst = work.edges.edge_index[:, order]
    counts = work.edges.edge_type.bincount(minlength=work.relations)
    ends = counts.cumsum(0).to(torch.int32)
    p = parameters(work)

    def product(x: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = F.grouped_mm(x.index_select(0, rows), weight, offs=ends)
        return found

    if work.model == "RGCNConv":
        share = mean_shares(work)[order, None]

        def forward(x: Tensor) -> Tensor:
            z = product(x, src, p["weight"]) * share
            summed: Tensor = (x @ p["root"] + p["bias"]).index_add(0, dst, z)
            return summed

        return work.step(forward, p)

    def attention(x: Tensor) -> Tensor:
        z = product(x, src, p["weight"])
        score = product(x, dst, p["weight"]) @ p["q"] + z @ p["k"]
        alpha = softmax(F.leaky_relu(score[:, 0], 0.2), dst, work.nodes)
        summed: Tensor = torch.zeros_like(x).index_add(0, dst, alpha[:, None] * z)
        return summed + p["bias"]

    return work.step(attention, p)


def parameters(work: Workload) -> dict[str, Tensor]:
    """The layer's parameters as leaves of their own."""
    return {name: value.clone().requires_grad_() for name, value in work.state.items()}


def mean_shares(work: Workload) -> Tensor:
    """One over the edges of a destination and relation, per edge: means within relations."""
    dst, relation = work.edges.edge_index[1], work.edges.edge_type
    _, pair, counts = torch.unique(
        relation * work.nodes + dst, return_inverse=True, return_counts=True
    )
    shares: Tensor = (1.0 / counts)[pair]
    return shares.to(work.x.dtype)


def softmax(score: Tensor, dst: Tensor, nodes: int) -> Tensor:
    """Softmax over the edges of each destination, [edges]."""
    top = score.new_full((nodes,), float("-inf")).scatter_reduce(0, dst, score.detach(), "amax")
    weight = (score - top[dst]).exp()
    total = torch.zeros_like(top).index_add(0, dst, weight)
    return weight / total.index_select(0, dst)


def _sparse_product(spread: Spread, values: Tensor, z: Tensor) -> Tensor:
    found: Tensor = _SparseProduct.apply(spread, values, z)  # type: ignore[no-untyped-call]
    return found


def _pointers(sorted_ids: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(sorted_ids, torch.arange(rows + 1, device=sorted_ids.device))
