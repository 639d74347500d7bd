"""What layers launch on a GPU, and how many kernels Triton compiles for that."""

import pytest
import torch

from dataeff import rgnn
from dataeff.nn.published import PUBLISHED
from dataeff.rgnn.triton import backend as triton_backend

pytest.importorskip("triton")
from launches import launching
from rgnn_layers import built_as_on_a_gpu

RELATIONS, NODE_TYPES, WIDTH, HEADS = 5, 3, 32, 2


def block(nodes, edges, seed=0):
    g = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, max(nodes, 1), (2, edges), generator=g)
    ends[1, : edges // 2] = 0  # a hub, for the kernels of long rows
    return typed(ends, nodes, torch.randint(0, RELATIONS, (edges,), generator=g))


def typed(ends, nodes, relation=None):
    relation = torch.arange(ends.shape[1]) % RELATIONS if relation is None else relation
    return rgnn.Graph(
        ends,
        relation,
        num_nodes=nodes,
        num_relations=RELATIONS,
        node_type=torch.arange(nodes) % NODE_TYPES,
        num_node_types=NODE_TYPES,
    )


def step(found, graph, dtype=torch.float32):
    """Forward and backward; what the tensors hold is nothing."""
    nodes = graph.num_src_nodes
    shapes = found.shapes(nodes, NODE_TYPES, RELATIONS, WIDTH, HEADS, WIDTH // HEADS)
    args = {k: torch.zeros(s, dtype=dtype, requires_grad=True) for k, s in shapes.items()}
    y = found.layer(graph, **args, **found.statics(HEADS))
    y = y[0] if isinstance(y, tuple) else y
    y.sum().backward()


@pytest.mark.parametrize("name", PUBLISHED)
def test_blocks_of_other_sizes_compile_nothing_new(name, monkeypatch):
    """Mini-batch training meets hundreds of sizes; a kernel takes a second to compile."""
    sizes = [(1000 + i, 9000 + 3 * i) for i in range(9)]
    with launching(monkeypatch, compiles=False) as driver:
        compiled = []
        for seed, (nodes, edges) in enumerate(sizes):
            step(PUBLISHED[name], block(nodes, edges, seed))
            compiled.append(set(driver.compiled))
    assert len(compiled[0]) > 5
    new = set.union(*compiled) - compiled[0]
    assert not {kernel for kernel, _ in new}


@pytest.mark.parametrize("name", PUBLISHED)
def test_of_any_size_there_are_few(name, monkeypatch):
    """From one edge to half a million: a kernel for each choice of tiles and order of steps."""
    sizes = [
        (1, 1),
        (2, 3),
        (16, 100),
        (100, 16),
        (10**3, 10**4),
        (10**4, 10**5),
        (10**5, 5 * 10**5),
    ]
    with launching(monkeypatch, compiles=False) as driver:
        for nodes, edges in sizes:
            step(PUBLISHED[name], block(nodes, edges))
    found = set(driver.compiled)
    kernels = [kernel for kernel, _ in found]
    # HGTConv's program, which has a bias for every map of a type, takes the most: 97.
    assert max(map(kernels.count, kernels)) <= 12 and len(found) <= 15 * len(sizes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_long_rows_are_launched_where_a_graph_has_some(name, monkeypatch):
    """Known from building its structures: the sizes of this graph leave room for 387."""
    ring = torch.arange(1000).repeat(50)
    with launching(monkeypatch, compiles=False) as driver, built_as_on_a_gpu():
        for ends in (torch.stack([ring, (ring + 1) % 1000]), torch.stack([ring, ring // 500])):
            before = len(driver.launched)
            step(PUBLISHED[name], typed(ends, 1000))
            names = [name for name, _ in driver.launched[before:]]
            assert any(name.endswith("_long") for name in names) == (ends[1].max() == 1)
            hubs = [name for name in names if "_hub" in name]  # each pair has 5,000 edges
            assert (
                bool(hubs) == any(name.endswith("_hubs") for name in hubs) == (ends[1].max() == 1)
            )


@pytest.mark.parametrize("name", PUBLISHED)
def test_however_many_rows_may_be_long_some_programs_share_them_out(name, monkeypatch):
    """Half a million edges leave room for 3,875 rows of more than 128."""
    with launching(monkeypatch, compiles=False) as driver:
        step(PUBLISHED[name], block(10_000, 500_000))
    grids = [grid[0] for kernel, grid in driver.launched if kernel.endswith("_long")]
    assert grids and max(grids) == triton_backend.MOST_PROGRAMS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_compiles_and_launches_as_on_a_gpu(monkeypatch, dtype):
    """Its options, arguments, grids and shared memory are those that Triton and the GPU take."""
    with launching(monkeypatch) as driver:
        step(PUBLISHED["rgcn"], block(1000, 9000), dtype)
    names = [name for name, _ in driver.launched]
    assert {"typed_gemm_kernel", "typed_gemm_dw_kernel", "reduce_partials_kernel"} <= set(names)
    assert sum(name.startswith("k") for name in names) > 3
    assert any(name.endswith("_long") for name in names)


def test_a_kernel_of_too_much_shared_memory_is_refused_before_it_is_launched(monkeypatch):
    """What `rgnn.tune` passes over."""
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr("launches.SHARED_NBYTES", 1 << 10)
    with launching(monkeypatch) as driver, pytest.raises(OutOfResources, match="shared memory"):
        step(PUBLISHED["rgcn"], block(10, 30))
    assert driver.launched == []


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("nodes", "edges"), [(5, 0), (0, 0), (1, 1)])
def test_no_grid_is_empty(monkeypatch, name, nodes, edges):
    """Which CUDA would refuse."""
    with launching(monkeypatch, compiles=False) as driver:
        step(PUBLISHED[name], block(nodes, edges))
    assert all(min(grid) > 0 for _, grid in driver.launched)
    assert driver.launched or not nodes
