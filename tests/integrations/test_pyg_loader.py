"""dataeff.integrations.pyg.NeighborLoader: PyG's batches, sampled and gathered by dataeff."""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import NeighborLoader as TheirLoader
from torch_geometric.nn import SAGEConv
from torch_geometric.sampler import NumNeighbors

import dataeff
from dataeff.integrations.pyg import LinkNeighborLoader, NeighborLoader
from dataeff.integrations.pyg.sampler import PyGNeighborSampler

NUM_NODES, NUM_EDGES = 200, 1500


def make_data(**extra):
    generator = torch.Generator().manual_seed(0)
    return Data(
        x=torch.randn(NUM_NODES, 5, generator=generator),
        y=torch.arange(NUM_NODES),
        edge_index=torch.randint(NUM_NODES, (2, NUM_EDGES), generator=generator),
        edge_attr=torch.arange(NUM_EDGES).float(),
        **extra,
    )


def make_hetero(seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = HeteroData()
    sizes = {"paper": 60, "author": 40, "venue": 5}
    for node_type, size in sizes.items():
        data[node_type].x = torch.randn(size, 3, generator=generator)
        data[node_type].y = torch.arange(size)
    for src, name, dst in (
        ("author", "writes", "paper"),
        ("paper", "cites", "paper"),
        ("paper", "rev_writes", "author"),
        ("paper", "in", "venue"),
    ):
        ends = [torch.randint(sizes[t], (150,), generator=generator) for t in (src, dst)]
        data[src, name, dst].edge_index = torch.stack(ends)
        data[src, name, dst].edge_attr = torch.arange(150)
    return data


def assert_same_batch(left, right):
    assert left.keys() == right.keys()
    for one, other in zip(left.stores, right.stores, strict=True):
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key]), key
            else:
                assert value == other[key], key


def assert_batch_of(data, batch, seeds):
    assert batch.batch_size == seeds.numel()
    assert torch.equal(batch.n_id[: batch.batch_size], seeds)
    assert batch.n_id.unique().numel() == batch.n_id.numel()
    assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
    assert torch.equal(batch.x, data.x[batch.n_id])
    assert torch.equal(batch.y, data.y[batch.n_id])
    assert torch.equal(batch.edge_attr, data.edge_attr[batch.e_id])
    assert sum(batch.num_sampled_nodes) == batch.num_nodes
    assert sum(batch.num_sampled_edges) == batch.num_edges


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_have_pyg_s_layout(num_workers):
    data = make_data()
    mask = torch.zeros(NUM_NODES, dtype=torch.bool)
    mask[::3] = True
    loader = NeighborLoader(data, [4, 3], input_nodes=mask, batch_size=16, num_workers=num_workers)
    assert isinstance(loader, TheirLoader)
    batches = list(loader)
    seeds = mask.nonzero().view(-1)
    assert len(batches) == len(loader) == -(-seeds.numel() // 16)
    for batch, own in zip(batches, seeds.split(16), strict=True):
        assert_batch_of(data, batch, own)
        assert torch.equal(batch.input_id, own)
        degree = torch.bincount(batch.edge_index[1], minlength=batch.num_nodes)
        available = torch.bincount(data.edge_index[1], minlength=NUM_NODES)[batch.n_id]
        first, second = batch.num_sampled_nodes[:2]
        assert torch.equal(degree[:first], available[:first].clamp(max=4))
        hop = slice(first, first + second)
        assert torch.equal(degree[hop], available[hop].clamp(max=3))
        assert (degree[first + second :] == 0).all()


def test_all_neighbours_are_the_whole_neighbourhood():
    data = make_data()
    batch = next(iter(NeighborLoader(data, [-1], input_nodes=torch.tensor([5, 7]), batch_size=2)))
    into = (data.edge_index[1] == 5) | (data.edge_index[1] == 7)
    assert torch.equal(batch.e_id.sort().values, into.nonzero().view(-1))


@pytest.mark.parametrize("shuffle", [False, True])
def test_threads_do_not_change_the_batches(shuffle):
    data = make_data()
    runs = []
    for num_workers, options in ((0, {}), (3, {}), (1, {"prefetch_factor": 7})):
        torch.manual_seed(3)
        loader = NeighborLoader(
            data, [4, 3], batch_size=13, shuffle=shuffle, num_workers=num_workers, **options
        )
        runs.append([list(loader), list(loader)])
    for run in runs[1:]:
        for left, right in zip(runs[0][0] + runs[0][1], run[0] + run[1], strict=True):
            assert_same_batch(left, right)
    first, second = runs[0][0][0], runs[0][1][0]
    assert not torch.equal(first.e_id, second.e_id)  # each epoch draws anew


def test_a_generator_fixes_the_run():
    def run():
        generator = torch.Generator().manual_seed(8)
        loader = NeighborLoader(
            make_data(), [4], batch_size=50, shuffle=True, generator=generator, num_workers=2
        )
        return list(loader)

    for left, right in zip(run(), run(), strict=True):
        assert_same_batch(left, right)


@pytest.mark.parametrize("filter_per_worker", [True, False])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_features_come_out_of_a_table(filter_per_worker, device):
    plain, tabled = make_data(), make_data()
    tabled.x = dataeff.FeatureTable(plain.x)
    tabled.edge_attr = dataeff.FeatureTable(plain.edge_attr)
    runs = []
    for data in (plain, tabled):
        torch.manual_seed(0)
        loader = NeighborLoader(
            data,
            [3, 3],
            batch_size=32,
            num_workers=2,
            filter_per_worker=filter_per_worker,
            device=device,
            transform=lambda batch: batch.put_tensor(2 * batch.x, attr_name="twice") and batch,
        )
        runs.append(list(loader))
    for left, right in zip(*runs, strict=True):
        assert isinstance(right.x, torch.Tensor)
        assert torch.equal(left.x, right.x)
        assert torch.equal(right.twice, 2 * right.x)
        assert torch.equal(left.edge_attr, right.edge_attr)
        assert torch.equal(left.y, right.y)
    assert isinstance(tabled.x, dataeff.FeatureTable)
    assert "num_nodes" not in tabled  # the caller's object is as it was
    assert tabled.x.stats().num_rows == sum(batch.num_nodes for batch in runs[1])


@pytest.mark.parametrize("filter_per_worker", [True, False])
def test_ids_that_the_data_came_with_choose_no_rows_of_tables(filter_per_worker):
    # As of a part of a larger graph, whose nodes and edges keep the numbers that they had there.
    data = make_data(n_id=torch.arange(NUM_NODES).flip(0), e_id=torch.arange(NUM_EDGES).flip(0))
    x, edge_attr = data.x, data.edge_attr
    data.x, data.edge_attr = dataeff.FeatureTable(x), dataeff.FeatureTable(edge_attr)
    for batch in NeighborLoader(data, [3], batch_size=50, filter_per_worker=filter_per_worker):
        assert torch.equal(batch.x, x.flip(0)[batch.n_id])
        assert torch.equal(batch.edge_attr, edge_attr.flip(0)[batch.e_id])


def test_typed_ids_that_the_data_came_with_choose_no_rows_of_tables():
    data, cites = make_hetero(), ("paper", "cites", "paper")
    x, edge_attr = data["paper"].x, data[cites].edge_attr
    data["paper"].n_id, data[cites].e_id = torch.arange(60).flip(0), torch.arange(150).flip(0)
    data["paper"].x, data[cites].edge_attr = map(dataeff.FeatureTable, (x, edge_attr))
    for batch in NeighborLoader(data, [3], "paper", batch_size=20):
        assert torch.equal(batch["paper"].x, x.flip(0)[batch["paper"].n_id])
        assert torch.equal(batch[cites].edge_attr, edge_attr.flip(0)[batch[cites].e_id])


@pytest.mark.filterwarnings("ignore:Cannot convert to bidirectional")  # no way back from venues
def test_tables_of_edges_that_were_made_one_give_no_rows():
    plain, tabled = make_hetero(), make_hetero()
    cites = ("paper", "cites", "paper")
    tabled[cites].edge_attr = dataeff.FeatureTable(plain[cites].edge_attr)
    for data in (plain, tabled):
        loader = NeighborLoader(data, [3], "paper", subgraph_type="bidirectional", batch_size=20)
        batch = next(iter(loader))[cites]
        assert list(batch.keys()) == ["edge_index"]


def test_options_of_processes_have_no_use_without_workers():
    options = {"worker_init_fn": print, "timeout": 3, "multiprocessing_context": "spawn"}
    assert len(list(NeighborLoader(make_data(), [2], batch_size=50, **options))) == 4


def test_each_thread_is_started_once_as_a_worker_of_torch_s():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()

    seen, threads = [], set()

    def start(worker_id):
        info = get_worker_info()
        seen.append((worker_id, info.id, info.num_workers, info.seed - worker_id, info.dataset))
        threads.add(threading.current_thread())
        torch.manual_seed(worker_id)
        np.random.seed(worker_id)

    def look(batch):
        assert get_worker_info() is None
        assert threading.current_thread() in threads
        return batch

    for filter_per_worker in (True, False):
        seen.clear()
        options = {"batch_size": 100, "num_workers": 3, "filter_per_worker": filter_per_worker}
        torch.manual_seed(5)
        plain = list(NeighborLoader(make_data(), [2], **options))
        after = states()
        if filter_per_worker:
            options["transform"] = look
        loader = NeighborLoader(make_data(), [2], worker_init_fn=start, **options)
        torch.manual_seed(5)
        for one, other in zip(loader, plain, strict=True):
            assert_same_batch(one, other)
        assert states() == after
        base = seen[0][3]
        assert sorted(entry[:4] for entry in seen) == [(i, i, 3, base) for i in range(3)]
        assert all(entry[4] is loader.dataset for entry in seen)
        list(loader)
        assert len(seen) == 6


def test_a_start_that_fails_reaches_the_caller():
    def start(worker_id):
        if worker_id == 1:
            raise KeyError("no file for worker 1")

    loader = NeighborLoader(make_data(), [2], num_workers=2, worker_init_fn=start)
    with pytest.raises(KeyError, match="no file for worker 1"):
        next(iter(loader))
    assert get_worker_info() is None
    assert not any("dataeff-loader" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("late", ["transform", "worker_init_fn"])
def test_a_batch_that_is_late_is_an_error_that_names_the_seconds(late):
    go_on = threading.Event()
    options = {late: lambda given: go_on.wait() and given}
    loader = NeighborLoader(make_data(), [2], num_workers=2, timeout=0.05, **options)
    with pytest.raises(RuntimeError, match=r"within timeout=0\.05 seconds"):
        next(iter(loader))
    go_on.set()
    assert next(iter(loader)).batch_size == 1


@pytest.mark.parametrize("options", [{}, {"store": "int8"}])
def test_a_graph_told_its_nodes_is_whole_for_pyg(options):
    data, typed = make_data(), make_hetero()
    data.x = dataeff.FeatureTable(data.x, **options)
    data.num_nodes = len(data.x)
    for name in ("paper", "author", "venue"):
        typed[name].x = dataeff.FeatureTable(typed[name].x, **options)
        typed[name].num_nodes = len(typed[name].x)
    assert data.validate() and typed.validate()
    assert (data.num_nodes, typed.num_nodes) == (NUM_NODES, 60 + 40 + 5)
    assert f"x=FeatureTable([{NUM_NODES}, 5], torch.float32)" in str(data)
    # PyG has no hook for widths: if it grows one, the guide has a table to lose.
    assert data.num_features == 0 and typed.num_features["paper"] == 0
    assert next(iter(NeighborLoader(data, [2]))).num_features == 5
    batch = next(iter(NeighborLoader(typed, [2], "paper")))
    assert batch.num_features == {"paper": 3, "author": 3, "venue": 3}


@pytest.mark.filterwarnings("ignore:Unable to accurately infer")  # it cannot see the table
def test_a_table_that_a_transform_passed_over_is_refused():
    data = make_data()
    data.x = dataeff.FeatureTable(data.x)
    fewer = data.subgraph(torch.arange(20))
    with pytest.raises(ValueError, match=r"x is a table of \d+ rows but y is of 20"):
        NeighborLoader(fewer, [3], batch_size=8)
    data.y = torch.zeros(data.num_edges)  # of edges
    data.graph_mask = torch.ones(1)
    assert len(next(iter(NeighborLoader(data, [3], batch_size=8))).x) >= 8


def test_hetero_batches():
    data = make_hetero()
    data["author"].x = dataeff.FeatureTable(features := data["author"].x)
    fanouts = {key: [3, 2] for key in data.edge_types}
    seeds = torch.arange(0, 60, 2)
    loader = NeighborLoader(
        data, fanouts, input_nodes=("paper", seeds), batch_size=8, num_workers=2
    )
    data["author"].x = features
    for batch, own in zip(loader, seeds.split(8), strict=True):
        assert batch["paper"].batch_size == own.numel()
        assert torch.equal(batch["paper"].input_id, torch.arange(len(own)) + own[0] // 2)
        assert torch.equal(batch["paper"].n_id[: own.numel()], own)
        for node_type in data.node_types:
            n_id = batch[node_type].n_id
            assert torch.equal(batch[node_type].x, data[node_type].x[n_id])
            assert torch.equal(batch[node_type].y, data[node_type].y[n_id])
            assert sum(batch[node_type].num_sampled_nodes) == n_id.numel()
        for key in data.edge_types:
            src, _, dst = key
            local, e_id = batch[key].edge_index, batch[key].e_id
            ends = torch.stack([batch[src].n_id[local[0]], batch[dst].n_id[local[1]]])
            assert torch.equal(ends, data[key].edge_index[:, e_id])
            assert torch.equal(batch[key].edge_attr, data[key].edge_attr[e_id])
            assert sum(batch[key].num_sampled_edges) == e_id.numel()


def test_disjoint_weighted_and_bidirectional_batches():
    data = make_data(weight=torch.rand(NUM_EDGES).round(decimals=1))
    seeds = torch.tensor([3, 4, 3])
    options = {"input_nodes": seeds, "batch_size": 3}
    batch = next(iter(NeighborLoader(data, [5, 5], disjoint=True, weight_attr="weight", **options)))
    assert batch.batch[:3].tolist() == [0, 1, 2]
    assert torch.equal(batch.batch[batch.edge_index[0]], batch.batch[batch.edge_index[1]])
    assert (batch.weight > 0).all()
    both = next(iter(NeighborLoader(data, [5], subgraph_type="bidirectional", **options)))
    edges = set(map(tuple, both.edge_index.t().tolist()))
    assert {(dst, src) for src, dst in edges} == edges


@pytest.mark.parametrize("options", [{"subgraph_type": "induced"}, {"directed": False}])
def test_induced_batches(options):
    data = make_data()
    batch = next(iter(NeighborLoader(data, [4, 4], batch_size=20, **options)))
    known = torch.zeros(NUM_NODES, dtype=torch.bool)
    known[batch.n_id] = True
    within = known[data.edge_index].all(0).nonzero().view(-1)
    assert torch.equal(batch.e_id.sort().values, within)
    assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
    assert "num_sampled_nodes" not in batch


def test_temporal_batches():
    data = make_data(time=torch.randint(100, (NUM_NODES,)), edge_time=torch.arange(NUM_EDGES))
    seeds = torch.arange(30)
    by_node = NeighborLoader(data, [5, 5], input_nodes=seeds, batch_size=10, time_attr="time")
    for batch in by_node:
        bound = data.time[batch.n_id[batch.batch]]  # a tree's root is its local seed
        assert (batch.time <= bound).all()
    until = torch.full((30,), 700)
    by_edge = NeighborLoader(
        data,
        [2],
        input_nodes=seeds,
        input_time=until,
        batch_size=30,
        time_attr="edge_time",
        temporal_strategy="last",
    )
    batch = next(iter(by_edge))
    for place, node in enumerate(seeds.tolist()):
        into = (data.edge_index[1] == node).nonzero().view(-1)
        latest = into[into <= 700][-2:]
        assert torch.equal(batch.e_id[batch.edge_index[1] == place], latest)


def test_hetero_temporal_batches():
    data = make_hetero()
    data["paper"].year = torch.arange(60) % 10
    data["author"].year = torch.arange(40) % 10
    data["venue"].year = torch.zeros(5, dtype=torch.int64)
    loader = NeighborLoader(
        data, [3, 3], input_nodes="paper", batch_size=20, time_attr="year", num_workers=1
    )
    for batch in loader:
        root_year = batch["paper"].year[: batch["paper"].batch_size]
        for node_type in data.node_types:
            assert (batch[node_type].year <= root_year[batch[node_type].batch]).all()


def test_seeds_of_a_type_without_edges_are_a_batch_of_themselves():
    data = make_hetero()
    data["editor"].x = torch.arange(7.0)
    [batch] = NeighborLoader(
        data, [2, 2], input_nodes=("editor", torch.tensor([4, 1])), batch_size=2
    )
    assert batch["editor"].x.tolist() == [4, 1] and batch["editor"].n_id.tolist() == [4, 1]
    assert batch["paper"].num_nodes == 0 and batch["paper", "cites", "paper"].num_edges == 0


def test_edge_types_without_weights_are_sampled_evenly():
    data = make_hetero()
    data["paper", "cites", "paper"].odds = (torch.arange(150) % 2).float()
    loader = NeighborLoader(data, [4], input_nodes="paper", batch_size=60, weight_attr="odds")
    [batch] = loader
    assert (batch["paper", "cites", "paper"].e_id % 2 == 1).all()
    taken = batch["author", "writes", "paper"].e_id
    assert 0 < (taken % 2).sum() < len(taken)


@pytest.mark.parametrize("strategy", ["uniform", "last"])
def test_types_without_times_are_bounded_by_none(strategy):
    data = make_hetero()
    data["paper"].year = torch.arange(60) % 10
    options = {"time_attr": "year", "temporal_strategy": strategy, "batch_size": 60}
    [batch] = NeighborLoader(data, [3], input_nodes="paper", **options)
    root_year = batch["paper"].year[:60]
    assert (batch["paper"].year <= root_year[batch["paper"].batch]).all()
    into = torch.bincount(data["author", "writes", "paper"].edge_index[1], minlength=60)
    taken = torch.bincount(batch["author", "writes", "paper"].edge_index[1], minlength=60)
    assert torch.equal(taken[:60], into[batch["paper"].n_id[:60]].clamp(max=3))
    with pytest.raises(ValueError, match=r"seeds of type 'author' .* input_time"):
        next(iter(NeighborLoader(data, [3], input_nodes="author", **options)))
    data["author", "writes", "paper"].year = torch.arange(150)
    with pytest.raises(ValueError, match="both nodes and edges"):
        NeighborLoader(data, [3], input_nodes="paper", **options)


def test_times_of_edges_ask_for_those_of_seeds():
    loader = NeighborLoader(make_data(when=torch.arange(NUM_EDGES)), [3], time_attr="when")
    with pytest.raises(ValueError, match="give the loader input_time"):
        next(iter(loader))


def test_there_is_one_time_for_each_seed():
    data = make_data()
    data.time = torch.zeros(NUM_NODES, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"input_time has {NUM_NODES} values for 3 input_nodes"):
        NeighborLoader(data, [2], input_nodes=[4, 5, 6], input_time=data.time, time_attr="time")


def test_an_error_in_a_thread_reaches_the_caller():
    def broken(batch):
        if 40 in batch.input_id:
            raise RuntimeError("node 40 is broken")
        return batch

    loader = NeighborLoader(make_data(), [2], batch_size=20, num_workers=2, transform=broken)
    batches = iter(loader)
    assert next(batches).batch_size == next(batches).batch_size == 20
    with pytest.raises(RuntimeError, match="node 40 is broken"):
        next(batches)
    assert not any("dataeff-loader" in thread.name for thread in threading.enumerate())
    bad = NeighborLoader(make_data(), [2], input_nodes=torch.tensor([0, 999]), num_workers=1)
    with pytest.raises(IndexError, match="seed 999"):
        list(bad)


def test_stopping_early_leaves_no_thread():
    began = []

    def slow(batch):
        began.append(1)
        time.sleep(0.01)
        return batch

    loader = NeighborLoader(make_data(), [2], batch_size=2, num_workers=2, transform=slow)
    for _ in loader:
        break
    gc.collect()
    assert not any("dataeff-loader" in thread.name for thread in threading.enumerate())
    assert len(began) <= 1 + 4  # the one taken, and the depth of two threads


def test_no_more_than_the_depth_is_prepared_ahead():
    began = threading.Semaphore(0)
    loader = NeighborLoader(
        make_data(),
        [2],
        batch_size=2,
        num_workers=1,
        prefetch_factor=3,
        transform=lambda batch: began.release() or batch,
    )
    batches = iter(loader)
    next(batches)
    time.sleep(0.05)
    count = 0
    while began.acquire(blocking=False):
        count += 1
    assert 1 <= count <= 3
    batches.close()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"worker_init_fn": 3, "num_workers": 1}, TypeError, "worker_init_fn=3 is not to be call"),
        (
            {"multiprocessing_context": "spawn", "num_workers": 1},
            NotImplementedError,
            "multiprocessing_context",
        ),
        ({"timeout": "3", "num_workers": 1}, TypeError, "timeout='3' is no number of seconds"),
        ({"timeout": -1, "num_workers": 1}, ValueError, "timeout=-1 is no time to wait"),
        ({"timeout": float("nan"), "num_workers": 1}, ValueError, "timeout=nan is no time to"),
        ({"subgraph_type": "reduced"}, ValueError, "reduced"),
        ({"num_workers": -1}, ValueError, "num_workers=-1"),
        ({"num_workers": "2"}, TypeError, "num_workers='2' is no integer"),
        ({"prefetch_factor": -1}, ValueError, "prefetch_factor=-1"),
        ({"temporal_strategy": "first"}, ValueError, "first"),
        ({"time_attr": "missing"}, ValueError, "'missing' is an attribute of neither nodes nor"),
        ({"input_time": torch.zeros(NUM_NODES)}, ValueError, "time_attr"),
        ({"neighbor_sampler": object()}, TypeError, "object"),
    ],
)
def test_what_is_not_supported_is_refused(options, error, said):
    with pytest.raises(error, match=said):
        NeighborLoader(make_data(), [2], **options)


@pytest.mark.parametrize("seeds", [None, "editor", torch.tensor([1]), ("editor", None)])
def test_seeds_of_a_typed_graph_name_a_node_type(seeds):
    with pytest.raises(ValueError, match=r"a node type of the graph, one of \['paper', 'author'"):
        NeighborLoader(make_hetero(), [2], input_nodes=seeds)


@pytest.mark.parametrize(
    "seeds", ["paper", ("paper", torch.tensor([1])), (None, torch.tensor([1])), {"paper": [1]}]
)
def test_seeds_of_a_graph_without_types_name_none(seeds):
    data = make_data()
    with pytest.raises(TypeError, match="input_nodes names one: give the seeds alone"):
        NeighborLoader(data, [2], input_nodes=seeds)
    for edges in (seeds, ("a", "to", "b"), (("a", "to", "b"), data.edge_index)):
        with pytest.raises(TypeError, match="edge_label_index names one: give the seeds alone"):
            LinkNeighborLoader(data, [2], edge_label_index=edges)


def test_fan_outs_by_edge_type_need_a_typed_graph():
    with pytest.raises(TypeError, match="one entry per hop"):
        NeighborLoader(make_data(), {("author", "writes", "paper"): [2]})


def test_fan_outs_of_pyg_s_type():
    data = make_hetero()
    fanouts = NumNeighbors({("author", "writes", "paper"): [2]}, default=[0])
    batch = next(iter(NeighborLoader(data, fanouts, input_nodes="paper", batch_size=60)))
    assert batch["author", "writes", "paper"].num_edges > 0
    assert batch["paper", "cites", "paper"].num_edges == 0


def test_fan_outs_of_pyg_s_type_serve_several_graphs():
    fanouts, fewer = NumNeighbors({}, default=[2]), make_hetero()
    del fewer["author", "writes", "paper"]
    for data in (fewer, make_hetero()):
        batch = next(iter(NeighborLoader(data, fanouts, input_nodes="paper", batch_size=60)))
        assert all(batch[kind].num_edges for kind in data.edge_types if kind[2] == "paper")


def test_the_default_of_pyg_s_type_without_types():
    drawn = []
    for fanouts in ([3, 2], NumNeighbors([3, 2]), NumNeighbors({}, default=[3, 2])):
        torch.manual_seed(0)
        drawn.append(next(iter(NeighborLoader(make_data(), fanouts, batch_size=10))).n_id)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    for fanouts in ({}, torch.tensor([3, 2])):
        with pytest.raises(TypeError, match=r"one entry per hop.*got (\{\}|tensor)"):
            NeighborLoader(make_data(), fanouts)


def test_a_table_of_another_length_is_refused():
    data = make_data()
    data.other = dataeff.FeatureTable(torch.zeros(7, 2))
    with pytest.raises(ValueError, match="7 rows"):
        next(iter(NeighborLoader(data, [2])))


def test_edge_indices_of_pyg_s_own_type():
    data, same = make_data(), make_data()
    same.edge_index = EdgeIndex(data.edge_index, sparse_size=(data.num_nodes, data.num_nodes))
    torch.manual_seed(0)
    first = next(iter(NeighborLoader(data, [3, 2], batch_size=10)))
    torch.manual_seed(0)
    second = next(iter(NeighborLoader(same, [3, 2], batch_size=10)))
    assert torch.equal(first.n_id, second.n_id) and torch.equal(first.e_id, second.e_id)


def test_a_table_of_edges_does_not_tell_the_number_of_nodes():
    data = make_data()
    data.pos, data.edge_attr = data.x, dataeff.FeatureTable(data.edge_attr)
    del data.x
    [batch] = NeighborLoader(data, [-1], batch_size=NUM_NODES)
    assert batch.n_id.tolist() == list(range(NUM_NODES))


def test_as_many_nodes_as_edges():
    ends = torch.randint(90, (2, 90), generator=torch.Generator().manual_seed(0))
    rows, edge_rows = torch.arange(90.0), torch.arange(90.0) + 1000
    data = Data(edge_index=ends, x=dataeff.FeatureTable(rows))
    data.edge_attr = dataeff.FeatureTable(edge_rows)
    for batch in NeighborLoader(data, [3], batch_size=30):
        assert torch.equal(batch.x, rows[batch.n_id])
        assert torch.equal(batch.edge_attr, edge_rows[batch.e_id])


@pytest.mark.parametrize("hetero", [False, True])
def test_weights_that_are_not_there_are_named(hetero):
    data = make_hetero() if hetero else make_data()
    with pytest.raises(ValueError, match="weight_attr 'odds'"):
        NeighborLoader(data, [2], ("paper" if hetero else None), weight_attr="odds")


class SAGE(torch.nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.first = SAGEConv(in_channels, 32)
        self.second = SAGEConv(32, num_classes)

    def forward(self, x, edge_index):
        return self.second(self.first(x, edge_index).relu(), edge_index)


@pytest.mark.parametrize("tabled", [False, True])
def test_graphsage_learns_what_only_neighbours_tell(tabled):
    # A node's class is that of its neighbours; its own features are noise, theirs show theirs.
    generator = torch.Generator().manual_seed(0)
    num_nodes, num_classes = 1200, 4
    y = torch.randint(num_classes, (num_nodes,), generator=generator)
    dst = torch.arange(num_nodes).repeat_interleave(12)
    order = y.argsort(stable=True)
    start = torch.searchsorted(y[order], torch.arange(num_classes))
    size = torch.bincount(y, minlength=num_classes)
    offset = torch.randint(1 << 30, dst.shape, generator=generator) % size[y[dst]]
    src = order[start[y[dst]] + offset]
    noise = torch.randn(num_nodes, num_classes, generator=generator)
    x = torch.nn.functional.one_hot(y, num_classes).float() + 2 * noise
    data = Data(x=dataeff.FeatureTable(x) if tabled else x, y=y, edge_index=torch.stack([src, dst]))
    torch.manual_seed(0)
    model = SAGE(num_classes, num_classes)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train, test = torch.arange(800), torch.arange(800, num_nodes)
    options = {"batch_size": 100, "num_workers": 2}
    for _ in range(5):
        for batch in NeighborLoader(data, [6, 6], input_nodes=train, shuffle=True, **options):
            loss = torch.nn.functional.cross_entropy(
                model(batch.x, batch.edge_index)[: batch.batch_size], batch.y[: batch.batch_size]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    correct = 0
    with torch.no_grad():
        for batch in NeighborLoader(data, [10, 10], input_nodes=test, **options):
            predicted = model(batch.x, batch.edge_index)[: batch.batch_size].argmax(1)
            correct += int((predicted == batch.y[: batch.batch_size]).sum())
    alone = (x[test].argmax(1) == y[test]).float().mean()
    assert alone < 0.55
    assert correct / test.numel() > 0.85


@pytest.mark.parametrize("num", [NUM_NODES - 1, NUM_NODES + 1])
def test_a_mask_of_another_length_is_refused(num):
    edge_index = torch.randint(NUM_NODES, (2, 4 * NUM_NODES))
    mask = torch.ones(num, dtype=torch.bool)
    homogeneous = Data(x=torch.randn(NUM_NODES, 2), edge_index=edge_index)
    typed = HeteroData({"a": {"x": homogeneous.x}, ("a", "to", "a"): {"edge_index": edge_index}})
    for data, seeds in ((homogeneous, mask), (typed, ("a", mask))):
        with pytest.raises(ValueError, match=rf"each of the {NUM_NODES} nodes.*\[{num}\]"):
            NeighborLoader(data, [2], input_nodes=seeds)


@pytest.mark.parametrize("kind", [list, np.asarray])
@pytest.mark.parametrize("hetero", [False, True])
def test_masks_in_lists_and_arrays_are_masks(kind, hetero):
    data = make_hetero() if hetero else make_data()
    mask = torch.zeros(60 if hetero else NUM_NODES, dtype=torch.bool)
    mask[[4, 7, 31]] = True
    listed = kind(mask.tolist())
    loader = NeighborLoader(data, [2], ("paper", listed) if hetero else listed, batch_size=9)
    (batch,) = loader
    seeds = batch["paper"].input_id if hetero else batch.input_id
    assert seeds.tolist() == [4, 7, 31]


@pytest.mark.parametrize(
    ("seeds", "error", "said"),
    [
        ([0.5, 1.7], TypeError, r"torch\.float32: use \.long\(\)"),
        (torch.ones(NUM_NODES, dtype=torch.uint8), TypeError, r"\.bool\(\) of a mask"),
        ({1, 2}, TypeError, "in a tensor, an array or a list"),
        (torch.tensor(3), ValueError, r"shape of \[\]"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"shape of \[2, 2\]"),
    ],
)
def test_seeds_that_are_no_ids_are_refused(seeds, error, said):
    with pytest.raises(error, match=said):
        NeighborLoader(make_data(), [2], seeds)


def test_no_seeds_give_no_batch():
    assert list(NeighborLoader(make_data(), [2], [])) == []


def test_edges_of_a_type_without_nodes_or_ends_are_refused():
    data = make_hetero()
    data["author", "visits", "place"].edge_index = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"data\['place'\]\.num_nodes"):
        NeighborLoader(data, [2], "paper")
    del data["author", "visits", "place"].edge_index
    data["author", "visits", "place"].edge_attr = torch.zeros(1)
    with pytest.raises(ValueError, match=r"'visits', 'place'\)\] has no edge_index"):
        NeighborLoader(data, [2], "paper")


@pytest.mark.parametrize("flag", ["replace", "disjoint", "directed", "filter_per_worker"])
def test_flags_are_bools(flag):
    data = Data(x=torch.randn(4, 2), edge_index=torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(TypeError, match=f"{flag}='no' is neither True nor False"):
        NeighborLoader(data, [2], **{flag: "no"})


def test_a_graph_that_no_gpu_can_read_is_sampled_on_the_host_with_the_reason(monkeypatch):
    data = Data(edge_index=torch.randint(20, (2, 60)), num_nodes=20)
    sampler = PyGNeighborSampler(data, [2])

    def refuse(device):
        raise RuntimeError("the locked-memory limit is 64 KiB")

    monkeypatch.setattr(sampler.sampler, "on_device", refuse)
    with pytest.warns(RuntimeWarning, match="sampled on the host.*locked-memory limit is 64 KiB"):
        assert not sampler.samples_on(torch.device("cpu"))
