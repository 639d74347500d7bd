"""Modes of torch and CUDA: deterministic algorithms, captures, allocators, scaled losses."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from dataeff import ActivationOffload, FeatureTable, HostEmbedding, HotRows, _core, rgnn
from dataeff.nn.published import PUBLISHED
from dataeff.sampling import CSCGraph, NeighborSampler

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _core.cuda_built), reason="needs a CUDA GPU and CUDA build"
)
NODES, EDGES, RELATIONS, NODE_TYPES, WIDTH = 500, 6000, 7, 3, 32


@pytest.fixture
def deterministic(monkeypatch):
    """torch refuses what has no deterministic form."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_graph():
    return rgnn.Graph(
        torch.randint(0, NODES, (2, EDGES), device="cuda"),
        torch.randint(0, RELATIONS, (EDGES,), device="cuda"),
        num_nodes=NODES,
        num_relations=RELATIONS,
        node_type=torch.arange(NODES, device="cuda") % NODE_TYPES,
        num_node_types=NODE_TYPES,
    )


def make_arguments(name):
    shapes = PUBLISHED[name].shapes(NODES, NODE_TYPES, RELATIONS, WIDTH, 2, WIDTH // 2)
    return {k: torch.randn(s, device="cuda", requires_grad=True) for k, s in shapes.items()}


def step(name, graph, args):
    y = PUBLISHED[name].layer(graph, **args, **PUBLISHED[name].statics(2))
    y = y[0] if isinstance(y, tuple) else y
    return [y, *torch.autograd.grad(y.square().sum(), list(args.values()))]


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_are_deterministic(deterministic, name):
    graph, args = make_graph(), make_arguments(name)
    for one, other in zip(step(name, graph, args), step(name, graph, args), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["static", "adaptive"])
def test_tables_are_deterministic(deterministic, policy):
    x = torch.randn(NODES, 40)
    with FeatureTable(x, hot=HotRows(50, torch.rand(NODES), policy=policy, every=1)) as table:
        for _ in range(5):
            index = torch.randint(NODES, (700,), device="cuda")
            assert torch.equal(table[index].cpu(), x[index.cpu()])
            assert torch.equal(table.gather(index, unique=True).cpu(), x[index.cpu()])
        table.scatter_(index, torch.zeros(700, 40, device="cuda"))
        assert not table[index].any()


def test_samples_and_gradients_are_deterministic(deterministic):
    sampler = NeighborSampler(CSCGraph(torch.randint(NODES, (2, EDGES)), num_nodes=NODES), [5, 3])
    seeds = torch.arange(40, device="cuda")
    one, other = sampler.sample(seeds, seed=1), sampler.sample(seeds, seed=1)
    assert torch.equal(one.n_id, other.n_id) and torch.equal(one.edge_index, other.edge_index)
    rows, found = HostEmbedding(NODES, 16), []
    for _ in range(2):
        rows.weight.grad = None
        rows(one.n_id.repeat(3)).square().sum().backward()
        found.append(rows.weight.grad.coalesce().values())
    assert torch.equal(*found)


def test_a_table_collected_in_a_capture_does_not_end_it():
    x, y = torch.randn(NODES, 40), torch.randn(NODES, 40)
    index = torch.arange(30, device="cuda")
    table, others = FeatureTable(x).register(), [FeatureTable(y).register()]
    table[index], others[0][index]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = table[index]
        others.clear()
        gc.collect()
        rows = rows * 2
    index.add_(5)
    graph.replay()
    assert torch.equal(rows.cpu(), x[5:35] * 2)
    assert _core.is_registered(y.data_ptr(), y.nbytes)
    with FeatureTable(torch.randn(3, 4)).register():
        assert not _core.is_registered(y.data_ptr(), y.nbytes)
    table.close()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_what_cannot_be_captured_is_refused_and_the_context_lives():
    index = torch.arange(30, device="cuda")
    new = FeatureTable(torch.randn(NODES, 40))
    captured = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(captured):
        new[index]
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh()).cuda()
    x = torch.randn(512, 64, device="cuda")
    model(x).sum().backward()
    offload = ActivationOffload(model, host_bytes=1 << 24, min_bytes=0)
    captured = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match="a CUDA graph is being captured")
    with offload, refused, torch.cuda.graph(captured):
        model(x)
    del refused  # its traceback keeps the graph of the stream that was captured
    with offload:
        model(x).sum().backward()
    offload.close()
    with new:
        assert torch.equal(new[index].cpu(), new[index.cpu()])


EXPANDABLE = """
import torch
from torch import nn
from dataeff import ActivationOffload, FeatureTable

x = torch.randn(1000, 100)
with FeatureTable(x) as table:
    index = torch.randint(1000, (5000,), device="cuda")
    assert torch.equal(table[index].cpu(), x[index.cpu()])
model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(256, 256), nn.Tanh())]).cuda()
batch = torch.randn(512, 256, device="cuda")

def gradients(offload=None):
    model.zero_grad()
    for _ in range(3):
        if offload is None:
            model(batch).sum().backward()
        else:
            with offload:
                model(batch).sum().backward()
    return [p.grad.clone() for p in model.parameters()]

expected = gradients()
offload = ActivationOffload(model, host_bytes=1 << 26, min_bytes=0)
found = gradients(offload)
assert all(torch.equal(a, b) for a, b in zip(found, expected))
assert offload.report().bytes_host > 0
offload.close()
"""


def test_expandable_segments():
    config = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-c", EXPANDABLE]
    subprocess.run(command, check=True, timeout=100, env={**os.environ, **config})


def test_rows_on_the_host_train_under_a_gradient_scaler_as_documented():
    def train(scaler):
        torch.manual_seed(4)
        rows, head = HostEmbedding(NODES, 16), torch.nn.Linear(16, 2).cuda()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        rows_optimizer = torch.optim.SGD(rows.parameters(), lr=0.1)
        for i in range(20):
            optimizer.zero_grad(), rows_optimizer.zero_grad()
            loss = head(rows(torch.arange(i, i + 50, device="cuda"))).square().mean()
            scaler.scale(loss).backward()
            rows.weight.grad /= scaler.get_scale()
            if rows.weight.grad.coalesce().values().isfinite().all():
                rows_optimizer.step()
            scaler.step(optimizer)
            scaler.update()
        return rows.weight.detach(), head.weight.detach()

    scaled = train(torch.amp.GradScaler("cuda", init_scale=2.0**10))
    plain = train(torch.amp.GradScaler("cuda", enabled=False))
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_tuning_measures_on_the_gpu_and_keeps_what_it_finds(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAEFF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(PUBLISHED["rgcn"].layer, "choices", {})
    graph = make_graph()
    args = {k: v.detach() for k, v in make_arguments("rgcn").items()}
    before = PUBLISHED["rgcn"].layer(graph, **args)
    found = rgnn.tune(PUBLISHED["rgcn"].layer, graph, **args, candidates=1, progress=False)
    assert found.candidates[0].measured_s > 0
    torch.testing.assert_close(PUBLISHED["rgcn"].layer(graph, **args), before, rtol=1e-3, atol=1e-3)
    assert rgnn.tune(PUBLISHED["rgcn"].layer, graph, **args).cached


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_cuda_graphs_of_inductor_replay_no_other_graph_and_no_other_rows():
    args = {k: v.detach() for k, v in make_arguments("rgcn").items()}
    tables = [FeatureTable(torch.randn(NODES, WIDTH)).register() for _ in range(2)]
    graphs = [make_graph().prepare() for _ in range(2)]

    def run(graph, table, index):
        given = {**args, "x": table[index].relu()}
        return PUBLISHED["rgcn"].layer(graph, **given) * 2

    compiled = torch.compile(run, mode="reduce-overhead")
    for _ in range(3):
        for graph, table in zip(graphs, tables, strict=True):
            index = torch.randperm(NODES, device="cuda")
            found = compiled(graph, table, index).clone()
            torch.testing.assert_close(found, run(graph, table, index), rtol=1e-4, atol=1e-4)
