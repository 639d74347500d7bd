"""PyG's layers beside ours, awkward graphs, blocks, compilation and tuning, on each device."""

import gc
import warnings

import pytest
import torch

from dataeff import nn, rgnn
from dataeff.nn.published import PUBLISHED

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyg = pytest.importorskip("torch_geometric.nn")

NODES, EDGES, RELATIONS = 300, 4000, 6
TYPES = (["a", "b"], [("a", "to", "b"), ("b", "to", "a"), ("b", "likes", "b")])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


def make_edges(device, num_edges=EDGES):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(NODES, (2, num_edges), generator=generator)
    ids[1, : num_edges // 5] = 7  # a hub
    return ids.to(device), torch.randint(RELATIONS, (num_edges,), generator=generator).to(device)


def alike(ours, theirs, device, dtype):
    torch.manual_seed(0)
    ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_close(found, right, dtype):
    error = (found.double() - right.double()).norm() / right.double().norm().clamp(min=1e-9)
    assert error < TOLERANCE[dtype]


LAYERS = {
    "rgcn": ("RGCNConv", {}),
    "rgcn, bases": ("RGCNConv", {"num_bases": 3}),
    "rgcn, blocks": ("RGCNConv", {"num_blocks": 4}),
    "rgcn, add": ("RGCNConv", {"aggr": "add"}),
    "rgcn, max": ("RGCNConv", {"aggr": "max"}),
    "rgat": ("RGATConv", {"heads": 2}),
    "rgat, within relations": (
        "RGATConv",
        {"attention_mechanism": "within-relation", "heads": 2, "concat": False},
    ),
    "rgat, multiplicative": (
        "RGATConv",
        {"attention_mode": "multiplicative-self-attention", "dim": 2},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_pyg_s_layers_and_gradients(device, name, dtype):
    kind, options = LAYERS[name]
    sizes = (16, 8, RELATIONS)
    ours, theirs = alike(
        getattr(nn, kind)(*sizes, **options), getattr(pyg, kind)(*sizes, **options), device, dtype
    )
    index, etype = make_edges(device)
    x = torch.randn(NODES, 16, device=device, dtype=dtype)
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        y = layer(own, index, etype)
        y.square().sum().backward()
        named = sorted(layer.named_parameters())
        results.append([y, own.grad, *(p.grad for _, p in named if p.grad is not None)])
    for found, right in zip(*results, strict=True):
        assert_close(found, right, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_hgt_of_typed_edges(device, dtype):
    ours, theirs = alike(
        nn.HGTConv(12, 8, TYPES, heads=2), pyg.HGTConv(12, 8, TYPES, heads=2), device, dtype
    )
    x = {t: torch.randn(200, 12, device=device, dtype=dtype) for t in TYPES[0]}
    edges = {key: torch.randint(200, (2, 1500), device=device) for key in TYPES[1]}
    found, right = ours(x, edges), theirs(x, edges)
    for t in TYPES[0]:
        assert_close(found[t], right[t], dtype)


AWKWARD = {
    "no edges": (torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 5, 3),
    "one node": (torch.zeros(2, 300, dtype=torch.long), torch.arange(300) % 2, 1, 4),
    "500 relations": (torch.randint(9, (2, 60)), torch.randint(500, (60,)), 9, 500),
    "isolated nodes": (torch.arange(20).view(2, 10) % 5, torch.zeros(10).long(), 900, 1),
}


@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("name", PUBLISHED)
def test_awkward_graphs_equal_the_reference(device, case, name, monkeypatch):
    index, etype, nodes, relations = AWKWARD[case]
    torch.manual_seed(0)
    shapes = PUBLISHED[name].shapes(nodes, 2, relations, 16, 2, 8)
    values = {k: torch.randn(*s, dtype=torch.float64) * 0.3 for k, s in shapes.items()}

    def run(place):
        graph = rgnn.Graph(
            index.to(place), etype.to(place), num_nodes=nodes, num_relations=relations,
            node_type=(torch.arange(nodes) % 2).to(place), num_node_types=2,
        )  # fmt: skip
        args = {k: v.to(place).requires_grad_() for k, v in values.items()}
        y = PUBLISHED[name].layer(graph, **args, **PUBLISHED[name].statics(2))
        y = y[0] if isinstance(y, tuple) else y
        return [y, *torch.autograd.grad(y.square().sum(), list(args.values()), allow_unused=True)]

    found = run(device)
    monkeypatch.setenv("DATAEFF_RGNN_BACKEND", "reference")
    for a, b in zip(found, run("cpu"), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a.cpu(), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_softmax_of_large_scores(device, scale):
    index, etype = make_edges(device)
    graph = rgnn.Graph(index, etype, num_nodes=NODES, num_relations=RELATIONS)

    @rgnn.layer
    def attend(g, s, x):
        return g.sum(rgnn.edge_softmax(g.src(s)) * g.src(x))

    s = (torch.rand(NODES, device=device) * scale).requires_grad_()
    y = attend(graph, s, torch.ones(NODES, 4, device=device))
    y.sum().backward()
    assert torch.isfinite(s.grad).all()
    has_edges = torch.bincount(index[1], minlength=NODES) > 0
    expected = has_edges.float()[:, None].expand(-1, 4)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=0)


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor:UserWarning",
)
def test_a_compiled_model_is_one_graph(device):
    layers = torch.nn.ModuleList(
        [nn.RGCNConv(16, 16, RELATIONS), nn.RGATConv(16, 8, RELATIONS)]
    ).to(device)

    def model(x, index, etype):
        for layer in layers:
            x = layer(x, index, etype).relu()
        return x

    index, etype = make_edges(device)
    x = torch.randn(NODES, 16, device=device)
    graph = rgnn.Graph(index, etype, num_nodes=NODES, num_relations=RELATIONS).prepare()
    for given in ((x, index, etype), (x, graph, None)):
        fullgraph = given[2] is None
        backend = "aot_eager" if device.type == "cpu" else "inductor"
        found = torch.compile(model, fullgraph=fullgraph, backend=backend)(*given)
        torch.testing.assert_close(found, model(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("embedded", [False, True], ids=["features", "node ids"])
def test_a_capture_outlives_calls_on_other_edges(embedded):
    """What layers remember of edges that are still there is not let go for others."""
    device = torch.device("cuda")
    conv = nn.RGCNConv(NODES if embedded else 16, 16, RELATIONS).to(device)
    x = None if embedded else torch.randn(NODES, 16, device=device)
    given = make_edges(device)

    @torch.no_grad()
    def call(index, etype):
        return conv(x, index, etype)

    want = call(*given)  # on the stream whose memory is filled with rubbish below
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = call(*given)
    others = [make_edges(device, EDGES + n) for n in range(12)]
    for other in others:
        call(*other)
    del other, others
    gc.collect()
    torch.cuda.synchronize()
    sizes = (NODES, EDGES, 2 * EDGES)
    rubbish = [
        torch.full((n,), 1 << 30, dtype=torch.int32, device=device)
        for n in sizes
        for _ in range(99)
    ]
    captured.replay()
    assert torch.equal(found, want) and rubbish


def test_training_on_sampled_blocks(device):
    from dataeff.sampling import CSCGraph, NeighborSampler

    index, etype = make_edges("cpu")
    sampler = NeighborSampler(CSCGraph(index, etype, num_nodes=NODES), [10])
    layer = nn.RGATConv(16, 8, RELATIONS).to(device)
    x = torch.randn(NODES, 16, device=device)
    for seed in range(3):
        seeds = torch.randperm(NODES)[:50].to(device)
        block = sampler.sample(seeds, seed=seed)
        layer.zero_grad()
        y = layer(x[block.n_id], block.edge_index, block.edge_type)[:50]
        y.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_tuning_keeps_the_values(device, monkeypatch, tmp_path):
    monkeypatch.setenv("DATAEFF_CACHE_DIR", str(tmp_path))
    index, etype = make_edges(device)
    graph = rgnn.Graph(
        index, etype, num_nodes=NODES, num_relations=RELATIONS,
        node_type=(torch.arange(NODES) % 2).to(device), num_node_types=2,
    )  # fmt: skip
    found = PUBLISHED["rgat"]
    shapes = found.shapes(NODES, 2, RELATIONS, 32, 2, 16)
    args = {k: torch.randn(*s, device=device) * 0.2 for k, s in shapes.items()}
    before = found.layer(graph, **args, **found.statics(2))
    choices = dict(found.layer.choices)
    try:
        tuning = rgnn.tune(found.layer, graph, **args, **found.statics(2), progress=False)
        measured = [c for c in tuning.candidates if c.measured_s is not None]
        assert len(measured) >= 2
        after = found.layer(graph, **args, **found.statics(2))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    finally:
        found.layer.choices.clear()
        found.layer.choices.update(choices)
