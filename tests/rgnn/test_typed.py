import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from pretended_gpu import GPU, PretendedGpu

from dataeff import nn, rgnn
from dataeff.rgnn import typed
from dataeff.sampling import CSCGraph, HeteroNeighborSampler, NeighborSampler

WRITES, CITES = ("author", "writes", "paper"), ("paper", "cites", "paper")
EDGES = {
    WRITES: torch.tensor([[0, 1, 1], [2, 0, 3]]),
    CITES: torch.tensor([[3, 1], [0, 2]]),
}
NODES = {"author": 2, "paper": 4}


def test_rows_of_a_whole_graph_are_blocks_of_types():
    graph = rgnn.Graph.from_typed(EDGES, NODES)
    assert graph.edge_index.tolist() == [[0, 1, 1, 5, 3], [4, 2, 5, 2, 4]]
    assert graph.edge_type.tolist() == [0, 0, 0, 1, 1]
    assert graph.node_type.tolist() == [0, 0, 1, 1, 1, 1]
    assert graph.layout.relation_ends(graph.device).tolist() == [[0, 1], [1, 1]]


def test_relations_are_numbered_as_listed():
    graph = rgnn.Graph.from_typed(EDGES, NODES, edge_types=[CITES, ("a", "b", "a"), WRITES][::2])
    assert graph.edge_type.tolist() == [1, 1, 1, 0, 0]


def test_destinations_of_a_block_are_its_first_rows():
    edges = {WRITES: torch.tensor([[0, 1, 1], [1, 0, 1]]), CITES: torch.tensor([[3, 1], [0, 1]])}
    graph = rgnn.Graph.from_typed(edges, NODES, num_dst_nodes={"author": 1, "paper": 2})
    # rows: author 0, papers 0 and 1, then author 1, papers 2 and 3
    assert graph.num_src_nodes == 6 and graph.num_dst_nodes == 3
    assert graph.node_type.tolist() == [0, 1, 1, 0, 1, 1]
    assert graph.edge_index.tolist() == [[0, 3, 3, 5, 2], [2, 1, 2, 1, 2]]
    x = {"author": torch.tensor([0.0, 1.0]), "paper": torch.tensor([10.0, 11.0, 12.0, 13.0])}
    rows = graph.layout.concatenate(x)
    assert rows.tolist() == [0, 10, 11, 1, 12, 13]
    assert [v.tolist() for v in graph.layout.split(rows[:3]).values()] == [[0], [10, 11]]


def test_hetero_data():
    pyg = pytest.importorskip("torch_geometric.data")
    data = pyg.HeteroData()
    data["author"].num_nodes = 2
    data["paper"].x = torch.zeros(4, 3)
    for key, index in EDGES.items():
        data[key].edge_index = index
    graph = rgnn.Graph.from_hetero(data)
    same = rgnn.Graph.from_typed(EDGES, NODES)
    assert torch.equal(graph.edge_index, same.edge_index)
    assert torch.equal(graph.edge_type, same.edge_type)


def test_sampled_block():
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 40, (2, 200), generator=g)
    sampler = NeighborSampler(CSCGraph(index, torch.arange(200) % 3, num_nodes=40), [4, 4])
    block = sampler.sample(torch.tensor([3, 7]), seed=1)
    graph = rgnn.Graph.from_block(block, num_relations=3)
    assert graph.num_src_nodes == block.n_id.numel() and graph.num_relations == 3
    assert torch.equal(graph.edge_index, block.edge_index)


def test_sampled_hetero_block():
    graphs = {
        WRITES: CSCGraph(EDGES[WRITES], num_nodes=(2, 4)),
        CITES: CSCGraph(EDGES[CITES], num_nodes=4),
    }
    block = HeteroNeighborSampler(graphs, [2]).sample({"paper": torch.tensor([0])}, seed=0)
    graph = rgnn.Graph.from_block(block)
    # paper 0 is reached from author 1 and from paper 3
    assert graph.num_edges == 2 and graph.edge_type.tolist() == [0, 1]
    assert block.n_id["author"].tolist() == [1] and block.n_id["paper"].tolist() == [0, 3]
    assert graph.edge_index.tolist() == [[0, 2], [1, 1]]


def test_the_graph_of_a_block_is_where_the_block_is(monkeypatch):
    with PretendedGpu(monkeypatch):
        edges = torch.tensor([[0, 1], [1, 0]], device="cuda")
        plain = SimpleNamespace(edge_index=edges, n_id=torch.arange(2, device="cuda"))
        typed = SimpleNamespace(edge_index={CITES: edges}, n_id={"paper": plain.n_id})
        for block in (plain, typed):
            assert rgnn.Graph.from_block(block).device == GPU
            assert rgnn.Graph.from_block(block, device="cpu").device.type == "cpu"


def test_graphs_without_an_edge_are_where_they_are_wanted(monkeypatch):
    pyg = pytest.importorskip("torch_geometric.data")
    with PretendedGpu(monkeypatch):
        x = {"author": torch.ones(2, 4, device="cuda"), "paper": torch.ones(4, 4, device="cuda")}
        data = pyg.HeteroData()
        data["paper"].x = x["paper"]
        block = SimpleNamespace(edge_index={}, n_id={"paper": torch.arange(3)})
        graphs = [
            rgnn.Graph.from_typed({}, NODES, device="cuda"),
            rgnn.Graph.from_typed(EDGES, NODES, device="cuda"),
            rgnn.Graph.from_block(block, device="cuda"),
            rgnn.Graph.from_hetero(data),
            nn.graphs.typed_graph_for({}, x, list(x), [WRITES]),
        ]
        for graph in graphs:
            assert graph.device == graph.node_type.device == graph.edge_type.device == GPU
        assert nn.graphs.typed_graph_for({}, x, list(x), []).num_edges == 0
        with pytest.raises(ValueError, match=r"node_type is on cpu, edge_index on cuda"):
            rgnn.Graph(
                torch.zeros(2, 1, dtype=torch.long, device="cuda"),
                num_nodes=1,
                node_type=torch.zeros(1, dtype=torch.long, device="cpu"),
                num_node_types=1,
            )
    assert rgnn.Graph.from_typed({}, NODES).device.type == "cpu"


def test_refusals():
    with pytest.raises(IndexError, match=r"source 2 of edge type .* 2 'author' nodes"):
        rgnn.Graph.from_typed({WRITES: torch.tensor([[2], [0]])}, NODES)
    with pytest.raises(ValueError, match="number of 'author' nodes"):
        rgnn.Graph.from_typed(EDGES, {"paper": 4})
    with pytest.raises(ValueError, match="is not among"):
        rgnn.Graph.from_typed(EDGES, NODES, edge_types=[CITES])
    with pytest.raises(ValueError, match="4 nodes, of which 5 destinations"):
        rgnn.Graph.from_typed(EDGES, NODES, num_dst_nodes={"paper": 5})
    graph = rgnn.Graph.from_typed(EDGES, NODES)
    with pytest.raises(ValueError, match="'paper' has 4 nodes in the graph, but features for 3"):
        graph.layout.concatenate({"author": torch.zeros(2), "paper": torch.zeros(3)})
    with pytest.raises(TypeError, match="num_nodes is a dictionary by type, got list"):
        rgnn.Graph.from_typed(EDGES, ["author", "paper"])
    with pytest.raises(TypeError, match=r"\(source type, relation, .* got 'writes'"):
        rgnn.Graph.from_typed({"writes": EDGES[WRITES]}, NODES)
    with pytest.raises(TypeError, match="edge_index and n_id"):
        rgnn.Graph.from_block(object())
    with pytest.raises(TypeError, match="takes a HeteroData, got object"):
        rgnn.Graph.from_hetero(object())


def test_merged_ids_go_when_edges_are_sorted_and_come_back_when_asked_for():
    graph = rgnn.Graph.from_typed(EDGES, NODES)
    before, held = graph.ids(), weakref.ref(graph.ids()[0])
    merged = [ids.clone() for ids in before]
    del before
    graph.prepare()
    gc.collect()
    assert held() is None
    assert all(map(torch.equal, graph.ids(), merged))
    assert torch.equal(graph.edge_index, merged[0]) and torch.equal(graph.edge_type, merged[1])
    for copy in (pickle.loads(pickle.dumps(graph)), graph.to("cpu")):
        assert all(map(torch.equal, copy.prepare().ids(), merged))
    given = graph.index("edge.given")
    assert torch.equal(graph.index("edge.dst").long(), merged[0][1][given].long())


def test_a_graph_keeps_no_edge_tensor_of_its_caller():
    edges = {key: index.clone() for key, index in EDGES.items()}
    held = weakref.ref(edges[CITES])
    graph = rgnn.Graph.from_typed(edges, NODES)
    del edges
    gc.collect()
    assert held() is None and graph.prepare().num_edges == 5


def _edges_by_loop(layout, edges):
    """Rows of every edge, one by one."""
    first, rest = layout.offsets()
    rows = []
    for key, ids in edges.items():
        s, d = (layout.node_types.index(key[end]) for end in (0, 2))
        for a, b in ids.t().tolist():
            source = a + (first[s] if a < layout.num_dst_nodes[s] else rest[s])
            rows.append((source, b + first[d], layout.edge_types.index(key)))
    return rows


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_edges_of_any_strides_and_dtypes_are_merged_alike_by_the_core_and_by_torch(whole, dtype):
    g = torch.Generator().manual_seed(0)
    nodes, inner = {"a": 9, "b": 0, "c": 70_000}, {"a": 4, "c": 60_000}
    edges = {
        ("a", "r", "c"): torch.randint(9, (40_000, 2), generator=g).t(),  # columns apart
        ("b", "r", "b"): torch.zeros(2, 0, dtype=torch.long),
        ("c", "r", "a"): torch.randint(4, (2, 60_000), generator=g)[:, ::2].to(dtype),
        ("c", "s", "a"): torch.tensor([[69_999], [3]]).expand(2, 7),
    }
    layout = typed.typed_layout(edges, nodes, None if whole else inner, list(edges)[::-1])
    (src, dst), types = typed.merge_edges(layout, edges)
    assert {ids.dtype for ids in (src, dst, types)} == {torch.int32}
    found = list(zip(src.tolist(), dst.tolist(), types.tolist(), strict=True))
    assert found == _edges_by_loop(layout, edges)
    (src2, dst2), types2 = typed._merged_by_torch(layout, edges, torch.int32, None)
    assert all(map(torch.equal, (src, dst, types), (src2, dst2, types2)))


def test_the_first_wrong_node_is_named_sources_before_destinations():
    many = torch.zeros(2, 100_000, dtype=torch.long)
    wrong = {key: many.clone() for key in ("b", "c", "d")}
    wrong["b"][1, 5] = 7
    wrong["c"][0, 70_000], wrong["c"][0, 3] = -1, 9
    wrong["d"][0, 0] = 8
    edges = {("n", key, "n"): ids for key, ids in wrong.items()}
    with pytest.raises(IndexError, match=r"source 9 of edge type \('n', 'c', 'n'\) at edge 3 "):
        rgnn.Graph.from_typed(edges, {"n": 7})
    with pytest.raises(IndexError, match=r"destination 7 of .*'b'.* at edge 5 .* 7 'n' nodes"):
        rgnn.Graph.from_typed({("n", "b", "n"): wrong["b"]}, {"n": 7})


def test_edges_by_type_that_are_no_ids_are_named():
    remedy = r"edges of \('n', 'r', 'n'\) must be int32 or int64, not torch.float32: use .long"
    with pytest.raises(TypeError, match=remedy):
        rgnn.Graph.from_typed({("n", "r", "n"): torch.zeros(2, 3)}, {"n": 7})


def test_parts_of_one_table_are_not_copied():
    names = ("a", "b", "c")
    layout = typed.typed_layout(
        {("a", "r", "b"): torch.zeros(2, 0).long()}, {"a": 3, "b": 4, "c": 2}, None, None
    )
    table = torch.randn(9, 5)
    parts = dict(zip(names, table.split([3, 4, 2]), strict=True))
    with torch.no_grad():
        whole = layout.concatenate(parts)
        assert whole.data_ptr() == table.data_ptr() and torch.equal(whole, table)
        for other in (
            {**parts, "b": parts["b"].clone()},
            {**parts, "a": table[4:7], "b": table[3:7]},
            {**parts, "b": parts["b"].flip(1)},
        ):
            found = layout.concatenate(other)
            assert torch.equal(found, torch.cat([other[n] for n in names]))
            assert found.data_ptr() != table.data_ptr()
    assert layout.concatenate(parts).data_ptr() != table.data_ptr()  # gradients may be wanted


@torch.no_grad()
def test_a_single_row_of_other_strides_does_not_say_how_the_rows_after_it_lie():
    table = torch.arange(32.0).view(4, 8)
    for rows in (slice(0, 1), slice(0, 0)):
        first = table[::2][rows]  # contiguous for torch, with the strides of every other row
        parts = [first, table[len(first) : 3]]
        whole = typed.joined(parts)
        assert whole is None or torch.equal(whole, torch.cat(parts))
