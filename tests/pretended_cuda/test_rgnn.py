"""Relational layers on a device whose streams run late: the values of the CPU.

A structure of the graph that is read before it is built, or given up while it is read, shows as
rubbish in the values; the kernels' own arithmetic is the interpreter's.
"""

import itertools
import os

import pytest
import torch

from dataeff import nn, rgnn
from dataeff.nn.published import PUBLISHED

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings(
    "ignore:The AccumulateGrad node's stream does not match the stream of the node"
)
SEEDS = range(1, 1 + int(os.environ.get("PRETENDED_CUDA_SEEDS", "4")))
NODES, EDGES, RELATIONS, NODE_TYPES, WIDTH = 20, 70, 3, 2, 16
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 8e-2}


def hold(stream=None):
    """Lets what is queued on a stream from now on begin late."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1)


def make_ids(device):
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, NODES, (2, EDGES), generator=generator)
    edges[1, : EDGES // 2] = 3  # a hub
    types = torch.randint(0, RELATIONS, (EDGES,), generator=generator)
    return edges.to(device), types.to(device), (torch.arange(NODES) % NODE_TYPES).to(device)


def make_graph(device):
    edges, types, node_types = make_ids(device)
    return rgnn.Graph(
        edges,
        types,
        num_nodes=NODES,
        num_relations=RELATIONS,
        node_type=node_types,
        num_node_types=NODE_TYPES,
    )


def make_arguments(name, device, dtype=torch.float32, width=WIDTH):
    torch.manual_seed(0)
    shapes = PUBLISHED[name].shapes(NODES, NODE_TYPES, RELATIONS, width, 2, width // 2)
    made = {k: torch.randn(*s) * s[-1] ** -0.5 for k, s in shapes.items()}
    return {k: v.to(device, dtype).requires_grad_() for k, v in made.items()}


def step(name, graph, args):
    """Output and gradients."""
    y = PUBLISHED[name].layer(graph, **args, **PUBLISHED[name].statics(2))
    y = y[0] if isinstance(y, tuple) else y
    return [y, *torch.autograd.grad(y.float().square().sum(), list(args.values()))]


def expected_of(name, dtype=torch.float32, width=WIDTH):
    """Output and gradients in float64 on the CPU: there is one interpreter, so the GPU is done."""
    torch.cuda.synchronize()
    args = make_arguments(name, "cpu", dtype, width)
    return step(
        name, make_graph("cpu"), {k: v.detach().double().requires_grad_() for k, v in args.items()}
    )


def assert_close(found, expected, dtype=torch.float32, of=None):
    for a, b in zip(found, expected, strict=True):
        # What attention sums to little has only the rounding of its terms left.
        least = 1.0 if dtype == torch.bfloat16 else 1e-12
        error = (a.detach().double().cpu() - b).norm() / b.norm().clamp(min=least)
        assert error < TOLERANCE[dtype], of


def dirty():
    """Takes and overwrites memory that the current stream has free."""
    sizes = (NODES, NODES + 1, EDGES, EDGES + 1, 64, 128, 256)
    return [torch.full((n,), 0x7B7B7B7B, device="cuda") for n in sizes for _ in range(8)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_cpu(late, name, dtype):
    expected = expected_of(name, dtype)
    late(SEEDS[-1])
    assert_close(
        step(name, make_graph("cuda"), make_arguments(name, "cuda", dtype)), expected, dtype
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_graph_serves_several_streams(late, name):
    """What the first stream builds for itself the second one finds, which waits for nobody."""
    expected = expected_of(name)
    late(0)
    args = make_arguments(name, "cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    graph = make_graph("cuda").prepare()
    torch.cuda.synchronize()
    hold(streams[0])
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(step(name, graph, args))
    torch.cuda.synchronize()
    for values in found:
        assert_close(values, expected)


@pytest.mark.parametrize("name", ["rgcn", "rgat"])
def test_a_graph_built_on_a_side_stream_and_dropped_while_it_is_read(late, name):
    """Its structures are the side stream's memory, which that stream may use again."""
    expected = expected_of(name)
    late(0)
    args = make_arguments(name, "cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph = make_graph("cuda")
        step(name, graph, args)  # builds all that the layer reads
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    hold()
    found = step(name, graph, args)
    del graph
    with torch.cuda.stream(side):
        dirty()
    torch.cuda.synchronize()
    assert_close(found, expected)


def test_layers_that_share_edges_on_several_streams(late):
    """`nn` keeps the graph of the edges that a layer was called with."""
    edges, types, _ = make_ids("cuda")
    torch.manual_seed(0)
    convs = [nn.RGATConv(WIDTH, 8, RELATIONS), nn.RGCNConv(WIDTH, 8, RELATIONS)]
    x = torch.randn(NODES, WIDTH)
    expected = [conv(x, edges.cpu(), types.cpu()).detach().double() for conv in convs]
    convs, x = [conv.cuda() for conv in convs], x.cuda()
    for seed in (0, SEEDS[-1]):
        late(seed)
        streams = [torch.cuda.Stream() for _ in range(2)]
        edges = edges.clone()  # of which no graph is known
        torch.cuda.synchronize()
        hold(streams[0])
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found += [conv(x, edges, types) for conv in convs]
        torch.cuda.synchronize()
        assert_close(found, expected * 2)


def test_several_layers_of_changing_widths(late):
    widths = [16, 8, 32, 4]
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(
        nn.RGCNConv(a, b, RELATIONS) for a, b in itertools.pairwise(widths)
    )
    x = torch.randn(NODES, widths[0])

    def run(device):
        edges, types, _ = make_ids(device)
        model = layers.to(device)
        model.zero_grad()
        y = x.to(device)
        for layer in model:
            y = layer(y, edges, types).tanh()
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = [value.double() for value in run("cpu")]
    for seed in (0, *SEEDS[-2:]):
        late(seed)
        assert_close(run("cuda"), expected, of=seed)


@pytest.mark.parametrize("name", ["rgcn", "rgat"])
def test_captured_steps_replay(late, name):
    late(0)
    graph, args = make_graph("cuda").prepare(), make_arguments(name, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(name, graph, args)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = step(name, graph, args)
    with torch.no_grad():
        args["x"].copy_(torch.randn(args["x"].shape))
    captured.replay()
    for a, b in zip(found, step(name, graph, args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_a_capture_that_would_build_structures_is_refused():
    graph, args = make_graph("cuda"), make_arguments("rgat", "cuda")
    captured = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match="run the layer once, forward and backward")
    with refused, torch.cuda.graph(captured):
        step("rgat", graph, args)
    assert_close(step("rgat", graph, args), expected_of("rgat"))


def test_wrong_ids_are_named_and_reach_no_kernel(late):
    for seed in (0, SEEDS[-1]):
        late(seed)
        edges, types, _ = make_ids("cuda")
        edges[0, 7] = NODES
        hold()
        options = {"num_nodes": NODES, "num_relations": RELATIONS}
        with pytest.raises(IndexError, match=f"source node {NODES} at edge 7"):
            rgnn.Graph(edges, types, **options)
        graph = rgnn.Graph(edges, types, **options, validate=False)
        with pytest.raises(IndexError, match=f"source node {NODES} at edge 7"):
            PUBLISHED["rgcn"].layer(graph, **make_arguments("rgcn", "cuda"))


def test_tuning_chooses_among_kernels_that_are_right(late, monkeypatch, tmp_path):
    late(SEEDS[-1])
    monkeypatch.setenv("DATAEFF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(PUBLISHED["rgcn"].layer, "choices", {})
    graph = make_graph("cuda")
    args = {k: v.detach() for k, v in make_arguments("rgcn", "cuda").items()}
    found = rgnn.tune(PUBLISHED["rgcn"].layer, graph, **args, candidates=1, progress=False)
    assert found.candidates[0].measured_s > 0
    args = make_arguments("rgcn", "cuda")
    assert_close(step("rgcn", graph, args), expected_of("rgcn"))
