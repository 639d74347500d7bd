"""CUDA graphs that Inductor makes leave out what looks its data up anew at each call.

A replay would read the memory, and walk the graph, that were there when it was captured.
"""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.utils import get_first_incompatible_cudagraph_node

import dataeff
from dataeff import rgnn


@rgnn.layer
def summed(g, x, W):
    return g.sum(rgnn.linear(g.src(x), W[g.etype]))


@pytest.fixture
def compiled():
    """Compiles a function; notes the operator that Inductor leaves out of each of its graphs."""

    def compile(function):
        left_out = []

        def inner(module, inputs):
            left_out.append(str(get_first_incompatible_cudagraph_node(module)))
            return make_boxed_func(module.forward)

        def backend(module, inputs):
            return aot_module_simplified(module, inputs, fw_compiler=inner)

        return torch.compile(function, backend=backend, fullgraph=True), left_out

    torch._dynamo.reset()
    yield compile
    torch._dynamo.reset()


def test_gathers(compiled):
    table = dataeff.FeatureTable(torch.randn(10, 4))
    function, left_out = compiled(lambda index: table[index] * 2)
    index = torch.tensor([3, 1])
    torch.testing.assert_close(function(index), table[index] * 2)
    assert left_out == ["gather"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_layers(compiled):
    W, x = torch.randn(1, 4, 4), torch.randn(3, 4, requires_grad=True)
    graph = rgnn.Graph(torch.tensor([[0, 1], [1, 2]]), num_nodes=3).prepare()
    function, left_out = compiled(lambda x: summed(graph, x, W))
    function(x).sum().backward()
    assert left_out == ["rgnn_forward", "rgnn_backward"]


@pytest.mark.parametrize(
    "name", ["gather_out", "gather_stored", "gather_stored_out", "gather_table", "unified_alias"]
)
def test_operators_that_write_or_need_a_gpu(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.dataeff, name).default.tags
