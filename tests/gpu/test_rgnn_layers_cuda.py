"""Layers on CUDA: the CPU's values, no host sync, CUDA graphs, dtypes, bad input."""

import pytest
import torch

from dataeff import rgnn
from dataeff.nn.published import PUBLISHED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
NODES, EDGES, RELATIONS, NODE_TYPES, WIDTH = 500, 6000, 7, 3, 32


def make_graph(device, num_edges=EDGES):
    g = torch.Generator().manual_seed(0)
    edges = torch.randint(0, NODES, (2, num_edges), generator=g)
    edges[1, : num_edges // 4] = 3  # a hub, for the kernels of long rows
    return rgnn.Graph(
        edges.to(device),
        torch.randint(0, RELATIONS, (num_edges,), generator=g).to(device),
        num_nodes=NODES,
        num_relations=RELATIONS,
        node_type=(torch.arange(NODES) % NODE_TYPES).to(device),
        num_node_types=NODE_TYPES,
    ).prepare()


def make_arguments(name, device, dtype=torch.float32, heads=2):
    torch.manual_seed(0)
    shapes = PUBLISHED[name].shapes(NODES, NODE_TYPES, RELATIONS, WIDTH, heads, WIDTH // heads)
    made = {k: torch.randn(*s) * s[-1] ** -0.5 for k, s in shapes.items()}
    return {k: v.to(device, dtype).requires_grad_() for k, v in made.items()}


def step(name, graph, args):
    """Output and gradients."""
    y = PUBLISHED[name].layer(graph, **args, **PUBLISHED[name].statics(2))
    y = y[0] if isinstance(y, tuple) else y  # the others are attention
    return [y, *torch.autograd.grad(y.float().square().sum(), list(args.values()))]


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_cpu(name, dtype):
    wide = {k: v.detach().double() for k, v in make_arguments(name, "cpu", dtype).items()}
    for value in wide.values():
        value.requires_grad_()
    want = step(name, make_graph("cpu"), wide)
    got = step(name, make_graph("cuda"), make_arguments(name, "cuda", dtype))
    again = step(name, make_graph("cuda"), make_arguments(name, "cuda", dtype))
    for a, b, c in zip(got, want, again, strict=True):
        assert a.dtype == dtype and torch.equal(a, c)
        error = (a.double().cpu() - b).norm() / b.norm().clamp(min=1e-12)
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_waits_for_the_device_once_the_graph_is_built(name, waits_are_errors):
    graph, args = make_graph("cuda"), make_arguments(name, "cuda")
    step(name, graph, args)
    with waits_are_errors():
        step(name, graph, args)


@pytest.mark.parametrize("name", PUBLISHED)
def test_forward_and_backward_are_captured_in_a_cuda_graph(name):
    graph, args = make_graph("cuda"), make_arguments(name, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(name, graph, args)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = step(name, graph, args)
    with torch.no_grad():
        args["x"].copy_(torch.randn_like(args["x"]))
    captured.replay()
    for a, b in zip(found, step(name, graph, args), strict=True):
        assert torch.equal(a, b)


def test_a_capture_keeps_the_indices_that_it_reads():
    """Those of edges to pairs of sources, beside which another layer has sources composed."""
    graph, args = make_graph("cuda"), make_arguments("rgat", "cuda")
    want = step("rgat", graph, args)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = step("rgat", graph, args)
    graph.index("edge.src")
    torch.cuda.synchronize()
    rubbish = [torch.full((EDGES,), 1 << 30, dtype=torch.int32, device="cuda") for _ in range(99)]
    captured.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True)) and rubbish


def test_autocast_computes_in_half_precision_and_float32_follows_the_tf32_flag():
    graph, args = make_graph("cuda"), make_arguments("rgcn", "cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = PUBLISHED["rgcn"].layer(graph, **args)
    assert y.dtype == torch.bfloat16
    exact = PUBLISHED["rgcn"].layer(graph, **{k: v.double() for k, v in args.items()})
    matmul = torch.backends.cuda.matmul
    before, errors = matmul.fp32_precision, {}
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            y = PUBLISHED["rgcn"].layer(graph, **args).double()
            errors[precision] = ((y - exact).norm() / exact.norm()).item()
    finally:
        matmul.fp32_precision = before
    assert errors["ieee"] < 1e-6 < errors["tf32"]


def test_bad_input_is_named_and_the_context_lives():
    edges = torch.tensor([[0, 9], [1, 0]], device="cuda")
    with pytest.raises(IndexError, match="source node 9 at edge 1"):
        rgnn.Graph(edges, num_nodes=3)
    types = torch.tensor([0, 5], device="cuda")
    with pytest.raises(IndexError, match="relation 5 at edge 1"):
        rgnn.Graph(edges.clamp(max=2), types, num_nodes=3, num_relations=2)
    graph, args = make_graph("cuda"), make_arguments("rgcn", "cuda")
    with pytest.raises(ValueError, match="argument x is on cpu, but the graph on cuda"):
        PUBLISHED["rgcn"].layer(graph, **{**args, "x": args["x"].cpu()})
    assert torch.isfinite(PUBLISHED["rgcn"].layer(graph, **args)).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("row", "value", "message"),
    [
        (0, NODES, "source node 500 at edge 77"),
        (1, -1, "destination node -1 at edge 77"),
        (2, 2**31 - 1, "relation 2147483647 at edge 77"),
    ],
)
def test_ids_that_were_not_validated_reach_no_kernel(dtype, row, value, message):
    ids = torch.randint(0, RELATIONS, (3, 1000), dtype=dtype, device="cuda")
    ids[row, 77] = value
    graph = rgnn.Graph(ids[:2], ids[2], num_nodes=NODES, num_relations=RELATIONS, validate=False)
    args = make_arguments("rgcn", "cuda")
    for _ in range(2):
        with pytest.raises(IndexError, match=message):
            PUBLISHED["rgcn"].layer(graph, **args)
    ids[row, 77] = 0
    right = rgnn.Graph(ids[:2], ids[2], num_nodes=NODES, num_relations=RELATIONS, validate=False)
    assert torch.isfinite(PUBLISHED["rgcn"].layer(right, **args)).all()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_capture_that_would_build_structures_is_refused():
    graph, args = make_graph("cuda"), make_arguments("rgat", "cuda")
    step("rgat", make_graph("cuda"), args)  # compiles, on a graph of its own
    captured = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="run the layer once, forward and backward"),
        torch.cuda.graph(captured),
    ):
        step("rgat", graph, args)
    eager = step("rgat", graph, args)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = step("rgat", graph, args)
    captured.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_run_on_the_device_of_their_tensors():
    for device in ("cuda:1", "cuda:0"):  # the current device is cuda:0 all along
        got = step("hgt", make_graph(device), make_arguments("hgt", device))
        want = step("hgt", make_graph("cpu"), make_arguments("hgt", "cpu"))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)


def test_no_edges():
    graph, args = make_graph("cuda", 0), make_arguments("rgat", "cuda")
    y, *gradients = step("rgat", graph, args)
    assert not y.any() and not any(g.any() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_node_types_with_many_relations_are_the_same_bits_each_time(dtype):
    """More relations of a type than a GPU adds up by index in one fixed order."""
    g = torch.Generator().manual_seed(0)
    nodes, relations = {"a": 9000, "b": 7000}, 40
    ends = [("a", "b") if k % 3 else ("b", "a") for k in range(relations)]
    edges = {
        (s, f"r{k}", d): torch.stack(
            [torch.randint(nodes[n], (2000,), generator=g) for n in (s, d)]
        )
        for k, (s, d) in enumerate(ends)
    }
    on = {
        device: rgnn.Graph.from_typed({r: e.to(device) for r, e in edges.items()}, nodes)
        for device in ("cpu", "cuda")
    }
    shapes = PUBLISHED["hgt"].shapes(sum(nodes.values()), 2, relations, 32, 1, 32)
    made = {k: (torch.randn(s, generator=g) * s[-1] ** -0.5).to(dtype) for k, s in shapes.items()}
    args = {k: v.cuda().requires_grad_() for k, v in made.items()}
    plan = PUBLISHED["hgt"].layer.plan(on["cuda"], **args, **PUBLISHED["hgt"].statics(2))
    assert "fold_types" in [name for name, _ in plan.compiled.stages]
    first = step("hgt", on["cuda"], args)
    for _ in range(5):
        again = step("hgt", on["cuda"], args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    want = step("hgt", on["cpu"], {k: v.double().requires_grad_() for k, v in made.items()})
    for a, b in zip(first, want, strict=True):
        error = (a.double().cpu() - b).norm() / b.norm().clamp(min=1e-12)
        assert error < TOLERANCE[dtype]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = step("hgt", on["cuda"], args)
    captured.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
