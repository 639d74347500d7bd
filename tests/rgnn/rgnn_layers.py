"""Random graphs, the layers that tests compile, and their formulas in plain PyTorch."""

import contextlib
from unittest import mock

import torch
from hypothesis import strategies as st

from dataeff import rgnn
from dataeff.nn.comp_gcn_conv import comp_gcn
from dataeff.nn.hgt_conv import hgt
from dataeff.nn.published import PUBLISHED
from dataeff.nn.simple_hgn_conv import simple_hgn
from dataeff.rgnn import sorting, structure


@st.composite
def graphs(draw):
    """Random graphs: empty relations, isolated nodes, loops, repeated edges, hubs, no edges."""
    nodes = draw(st.integers(1, 12))
    relations = draw(st.integers(1, 5))
    edges = draw(st.integers(0, 40))
    shown = draw(st.integers(1, relations))  # the others stay empty
    reach = draw(st.integers(1, nodes))  # destinations beyond stay isolated
    seed = draw(st.integers(0, 2**16))
    g = torch.Generator().manual_seed(seed)
    src = torch.randint(0, nodes, (edges,), generator=g)
    dst = torch.randint(0, reach, (edges,), generator=g)
    if draw(st.booleans()):
        src = torch.zeros_like(src)
    etype = torch.randint(0, shown, (edges,), generator=g)
    return torch.stack([src, dst]), etype, nodes, relations


@contextlib.contextmanager
def built_as_on_a_gpu():
    """Index structures of CPU tensors are built by the code that a GPU runs."""
    with (
        mock.patch.object(sorting, "by_torch", lambda ids: True),
        mock.patch.object(structure, "by_torch", lambda ids: True),
    ):
        yield


@rgnn.layer
def rgcn(g, x, W):
    return g.sum(rgnn.linear(g.src(x), W[g.etype]))


@rgnn.layer
def rgcn_mean(g, x, W, root, bias):
    h = g.mean_per_relation(rgnn.linear(g.src(x), W[g.etype]))
    return h + rgnn.linear(x, root) + bias


@rgnn.layer
def rgat(g, x, W, a_src, a_dst):
    z_src = rgnn.linear(g.src(x), W[g.etype])
    z_dst = rgnn.linear(g.dst(x), W[g.etype])
    score = rgnn.leaky_relu(rgnn.dot(z_src, a_src[g.etype]) + rgnn.dot(z_dst, a_dst[g.etype]), 0.2)
    return g.sum(rgnn.edge_softmax(score) * z_src)


@rgnn.layer
def gated(g, x, W, U, c, e):
    """In no paper: a typed gate from both ends and an edge attribute, maximum and mean mixed."""
    z = rgnn.tanh(rgnn.linear(g.src(x), W[g.etype]))
    gate = rgnn.sigmoid(rgnn.dot(rgnn.linear(g.dst(x), U), z) * c[g.etype] + g.edge(e))
    return rgnn.concat(g.max(z), g.mean(gate * z)) / (1.0 + g.in_degree())


def rgcn_loop(edge_index, etype, x, W):
    out = x.new_zeros(x.shape[0], W.shape[2])
    for (s, d), r in zip(edge_index.t().tolist(), etype.tolist(), strict=True):
        out = out.index_add(0, torch.tensor([d]), (x[s] @ W[r])[None])
    return out


def rgat_dense(edge_index, etype, x, W, a_src, a_dst):
    src, dst = edge_index
    z_src = torch.einsum("ei,eio->eo", x[src], W[etype])
    z_dst = torch.einsum("ei,eio->eo", x[dst], W[etype])
    score = (z_src * a_src[etype]).sum(-1) + (z_dst * a_dst[etype]).sum(-1)
    score = torch.nn.functional.leaky_relu(score, 0.2)
    out = []
    for node in range(x.shape[0]):
        mine = dst == node
        out.append((torch.softmax(score[mine], 0)[:, None] * z_src[mine]).sum(0))
    return torch.stack(out)


def rgcn_mean_dense(edge_index, etype, x, W, root, bias):
    out = x @ root + bias
    for r in range(W.shape[0]):
        src, dst = edge_index[:, etype == r]
        total = torch.zeros_like(x).index_add(0, dst, x[src])
        count = torch.bincount(dst, minlength=x.shape[0]).clamp(min=1).to(x.dtype)
        out = out + (total / count[:, None]) @ W[r]
    return out


@rgnn.layer
def heads(g, x, W, K, a):
    """In no paper: heads, concatenation, slices, broadcasts and a per-relation softmax."""
    z = rgnn.linear(g.src(x), W[g.etype])
    left, right = rgnn.split(rgnn.linear(rgnn.concat(z, rgnn.gelu(z)), K), (10, 14))
    q = rgnn.reshape(rgnn.concat(left, right) * a[g.etype], 2, 12)
    score = rgnn.dot(q, rgnn.reshape(rgnn.linear(g.dst(x), W[g.etype]), 1, 12))
    alpha = rgnn.edge_softmax(score, per_relation=True)
    return g.sum(alpha * q) - g.mean(rgnn.sqrt(1.0 + rgnn.relu(q)))


NODE_TYPES = 2
STATICS = {found.layer: found.statics(2) for found in PUBLISHED.values()}


def tensors(layer, nodes, edges, relations, dtype, width=5, out=6, scale=0.4):
    """Random arguments of a layer, by name."""
    x, W, c = (nodes, width), (relations, width, out), (relations, out)
    published = {
        found.layer: found.shapes(nodes, NODE_TYPES, relations, width, 2, 3)
        for found in PUBLISHED.values()
    }
    shapes = {
        rgcn: {"x": x, "W": W},
        rgcn_mean: {"x": x, "W": W, "root": (width, out), "bias": (out,)},
        rgat: {"x": x, "W": W, "a_src": c, "a_dst": c},
        gated: {"x": x, "W": W, "U": (width, out), "c": (relations,), "e": (edges,)},
        heads: {"x": x, "W": (relations, width, 12), "K": (24, 24), "a": (relations, 24)},
        hgt: published[hgt],
        simple_hgn: published[simple_hgn] | {"previous": (edges, 2), "keep": (edges, 2)},
        comp_gcn: published[comp_gcn] | {"edge_weight": (edges,)},
    }[layer]
    return {name: scale * torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def typed_graph(case):
    """A graph of `graphs()` whose nodes have types."""
    edge_index, etype, nodes, relations = case
    types = torch.arange(nodes) % NODE_TYPES
    return rgnn.Graph(
        edge_index,
        etype,
        num_nodes=nodes,
        num_relations=relations,
        node_type=types,
        num_node_types=NODE_TYPES,
    )
