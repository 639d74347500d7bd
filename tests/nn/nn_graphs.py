"""Random relational graphs for tests of layers."""

import torch
from hypothesis import strategies as st


@st.composite
def relational(draw, max_nodes=10, max_edges=40):
    """(edge_index, edge_type, num_nodes, num_relations), with every awkward kind of graph.

    Empty relations, isolated nodes, self loops, repeated edges, hubs, one node, one relation, no
    edges.
    """
    nodes, relations = draw(st.integers(1, max_nodes)), draw(st.integers(1, 5))
    edges = draw(st.integers(0, max_edges))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    src = torch.randint(0, nodes, (edges,), generator=g)
    dst = torch.randint(0, draw(st.integers(1, nodes)), (edges,), generator=g)
    kind = draw(st.sampled_from(["random", "hub", "loops"]))
    src = torch.zeros_like(src) if kind == "hub" else dst if kind == "loops" else src
    etype = torch.randint(0, draw(st.integers(1, relations)), (edges,), generator=g)
    return torch.stack([src, dst]), etype, nodes, relations


def many_relations():
    """500 relations on few edges: most of them are empty or have a single edge."""
    g = torch.Generator().manual_seed(7)
    index = torch.randint(0, 40, (2, 600), generator=g)
    return index, torch.randint(0, 500, (600,), generator=g), 40, 500


def close(have, want, tolerance, what=""):
    """Equal to within `tolerance` of the largest entry."""
    scale = max(1.0, float(want.detach().abs().max()) if want.numel() else 0.0)
    torch.testing.assert_close(
        have, want, rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{what}: {m}"
    )


def compare(ours, theirs, tensors, tolerance):
    """Results of two functions, and the gradients of `tensors` and of what they share.

    Args:
        ours, theirs: called without arguments; a tensor or a tuple of them each.
        tensors: (name, tensor of ours, tensor of theirs).
        tolerance: relative to the largest entry.
    """
    a, b = (f() for f in (ours, theirs))
    a, b = (v if isinstance(v, tuple) else (v,) for v in (a, b))
    weights = [torch.randn_like(v) for v in b]
    for have, want in zip(a, b, strict=True):
        close(have, want, tolerance, "result")
    gradients = []
    for out, column in ((a, 1), (b, 2)):
        loss = sum((v * w).sum() for v, w in zip(out, weights, strict=True))
        inputs = [t[column] for t in tensors]
        gradients.append(
            torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            if loss.requires_grad
            else [torch.zeros_like(t) for t in inputs]
        )
    for (name, *_), have, want in zip(tensors, *gradients, strict=True):
        close(have, want, tolerance, f"gradient of {name}")
