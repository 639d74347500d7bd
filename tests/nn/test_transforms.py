"""Ensembles and gradients of samples by torch.func, against PyTorch Geometric."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from dataeff import nn

pyg = pytest.importorskip("torch_geometric.nn")

EDGES = torch.randint(0, 9, (2, 30), generator=torch.Generator().manual_seed(3))
TYPES = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(4))
KINDS = [("a", "to", "b"), ("b", "to", "a"), ("b", "likes", "b")]
TYPED = {kind: EDGES[:, 10 * k : 10 * k + 10] % 5 for k, kind in enumerate(KINDS)}
MULTIPLICATIVE = {"attention_mode": "multiplicative-self-attention", "dim": 2, "mod": "scaled"}

CASES = {
    "RGCN": ("RGCNConv", (6, 4, 4), {}),
    "RGCN with bases": ("RGCNConv", (6, 4, 4), {"num_bases": 2, "aggr": "add"}),
    "RGAT": ("RGATConv", (6, 4, 4), {"heads": 2}),
    "RGAT, multiplicative": ("RGATConv", (6, 4, 4), {"heads": 2, **MULTIPLICATIVE}),
    "HGT": ("HGTConv", (6, 6, (["a", "b"], KINDS)), {"heads": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_ensembles_and_gradients_of_samples_are_those_of_pyg(case):
    torch.manual_seed(0)
    name, args, options = CASES[case]
    ours, theirs = (getattr(m, name)(*args, **options).double() for m in (nn, pyg))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    theirs.load_state_dict(ours.state_dict())
    if name == "HGTConv":
        x = {t: torch.randn(3, 5, 6, dtype=torch.float64) for t in "ab"}
        edges = (TYPED,)
    else:
        x, edges = torch.randn(3, 9, 6, dtype=torch.float64), (EDGES, TYPES)
    models = {
        key: torch.stack([value.detach() * scale for scale in (1.0, 1.1, 0.7)])
        for key, value in ours.named_parameters()
    }

    def run(conv, parameters, x):
        out = functional_call(conv, parameters, (x, *edges))
        return torch.cat(list(out.values())) if isinstance(out, dict) else out

    def loss(conv):
        return lambda parameters, x: run(conv, parameters, x).square().sum()

    def one(k):
        features = {t: rows[k] for t, rows in x.items()} if isinstance(x, dict) else x[k]
        return {key: value[k] for key, value in models.items()}, features

    got = vmap(lambda p, x: run(ours, p, x))(models, x)
    torch.testing.assert_close(got, torch.stack([run(theirs, *one(k)) for k in range(3)]))
    got = vmap(grad(loss(ours)))(models, x)
    want = [grad(loss(theirs))(*one(k)) for k in range(3)]
    torch.testing.assert_close(got, {key: torch.stack([w[key] for w in want]) for key in models})
