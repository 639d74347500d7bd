"""NeighborSampler against the reference of dataeff.sampling.reference, and against chance."""

import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dataeff.memory import HostBuffer
from dataeff.sampling import CSCGraph, HeteroNeighborSampler, NeighborSampler
from dataeff.sampling import reference as ref


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_graph(num_nodes, num_edges, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(num_nodes, (2, num_edges), generator=generator)
    return CSCGraph(edge_index, num_nodes=num_nodes, **options)


def as_relation(graph, fanouts):
    def listed(tensor):
        return None if tensor is None else tensor.tolist()

    return ref.Relation(
        0,
        0,
        graph.colptr.tolist(),
        graph.row.tolist(),
        fanouts,
        e_id=listed(graph.e_id),
        etype=listed(graph.edge_type),
        weights=listed(graph.edge_weight),
        times=listed(graph.edge_time),
    )


def assert_equals_reference(graph, sampler, out, seeds, seed, seed_time=None, **options):
    relation = as_relation(graph, sampler.fanouts)
    expected = ref.sample(
        [relation],
        [seeds.tolist()],
        seed,
        disjoint=sampler.disjoint,
        seed_times=None if seed_time is None else [seed_time.tolist()],
        **options,
    )
    places = [place for _, _, place in expected.edges[0]]
    assert out.n_id.tolist() == [node for _, node in expected.nodes[0]]
    assert out.edge_index[0].tolist() == [src for src, _, _ in expected.edges[0]]
    assert out.edge_index[1].tolist() == [dst for _, dst, _ in expected.edges[0]]
    assert out.e_id.tolist() == [relation.e_id[p] if relation.e_id else p for p in places]
    assert out.num_sampled_nodes == expected.nodes_per_hop[0]
    assert out.num_sampled_edges == expected.edges_per_hop[0]
    assert out.num_seeds == seeds.numel()
    if relation.etype is not None:
        assert out.edge_type.tolist() == [relation.etype[p] for p in places]
    else:
        assert out.edge_type is None
    if sampler.disjoint:
        assert out.batch.tolist() == [tree for tree, _ in expected.nodes[0]]
    else:
        assert out.batch is None


@st.composite
def cases(draw):
    num_nodes = draw(st.integers(1, 30))
    num_edges = draw(st.integers(0, 200))
    shape = {
        "num_nodes": num_nodes,
        "num_edges": num_edges,
        "seed": draw(st.integers(0, 2**31)),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
    }
    seeds = draw(st.lists(st.integers(0, num_nodes - 1), max_size=8))
    seeds = torch.tensor(seeds, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    return shape, seeds, draw(st.integers(-(2**63), 2**64 - 1))


hops = st.lists(st.integers(-1, 6), min_size=1, max_size=3)


@given(cases(), hops, st.booleans(), st.booleans())
def test_uniform_equals_reference(case, fanouts, replace, disjoint):
    shape, seeds, seed = case
    graph = random_graph(**shape)
    sampler = NeighborSampler(graph, fanouts, replace=replace, disjoint=disjoint)
    out = sampler.sample(seeds, seed=seed)
    assert_equals_reference(graph, sampler, out, seeds, seed, replace=replace)


@given(cases(), hops, st.booleans())
def test_induced_equals_reference(case, fanouts, disjoint):
    shape, seeds, seed = case
    edge_type = torch.randint(3, (shape["num_edges"],), generator=torch.manual_seed(0))
    graph = random_graph(**shape, edge_type=edge_type, num_relations=3)
    sampler = NeighborSampler(graph, fanouts, induced=True, disjoint=disjoint)
    out = sampler.sample(seeds, seed=seed)
    assert_equals_reference(graph, sampler, out, seeds, seed, induced=True)


@given(cases(), st.data(), st.booleans())
def test_fan_outs_per_relation_equal_reference(case, data, replace):
    shape, seeds, seed = case
    edge_type = torch.randint(3, (shape["num_edges"],), generator=torch.manual_seed(0))
    graph = random_graph(**shape, edge_type=edge_type, num_relations=3)
    per_relation = st.lists(st.integers(-1, 4), min_size=3, max_size=3)
    hop = st.one_of(st.integers(-1, 5), per_relation)
    fanouts = data.draw(st.lists(hop, min_size=1, max_size=3))
    sampler = NeighborSampler(graph, fanouts, replace=replace)
    out = sampler.sample(seeds, seed=seed)
    assert_equals_reference(graph, sampler, out, seeds, seed, replace=replace)


@given(cases(), hops, st.booleans(), st.booleans())
def test_weighted_equals_reference(case, fanouts, replace, disjoint):
    shape, seeds, seed = case
    weight = torch.randint(4, (shape["num_edges"],), generator=torch.manual_seed(1)) / 3
    graph = random_graph(**shape, edge_weight=weight)
    sampler = NeighborSampler(graph, fanouts, replace=replace, disjoint=disjoint)
    out = sampler.sample(seeds, seed=seed)
    assert_equals_reference(graph, sampler, out, seeds, seed, replace=replace)


@given(cases(), hops, st.sampled_from([(False, False), (True, False), (False, True)]))
def test_temporal_equals_reference(case, fanouts, mode):
    shape, seeds, seed = case
    replace, last = mode
    generator = torch.manual_seed(2)
    time = torch.randint(10, (shape["num_edges"],), generator=generator)
    seed_time = torch.randint(-1, 11, seeds.shape, generator=generator)
    graph = random_graph(**shape, edge_time=time)
    sampler = NeighborSampler(graph, fanouts, replace=replace, last=last)
    out = sampler.sample(seeds, seed=seed, seed_time=seed_time)
    assert_equals_reference(
        graph, sampler, out, seeds, seed, seed_time=seed_time, replace=replace, last=last
    )
    assert (time[out.e_id] <= seed_time[out.batch[out.edge_index[1]]]).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("disjoint", [False, True])
def test_hubs_and_wide_fan_outs_equal_reference(index_dtype, disjoint):
    # Fan-outs above 32 take the bitmap path, and the batch outgrows its first hash table.
    hub = torch.stack(
        [torch.arange(3000), torch.randint(3, (3000,), generator=torch.manual_seed(3))]
    )
    graph = CSCGraph(hub, num_nodes=3000, index_dtype=index_dtype)
    sampler = NeighborSampler(graph, [700, 40], disjoint=disjoint)
    seeds = torch.tensor([2, 0])
    out = sampler.sample(seeds, seed=5)
    assert_equals_reference(graph, sampler, out, seeds, 5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.booleans())
def test_structure(seed, replace):
    graph = random_graph(500, 6000, seed=seed)
    sources = torch.empty(graph.num_edges, dtype=torch.int64)
    targets = torch.empty_like(sources)
    sources[graph.e_id.long()] = graph.row.long()
    columns = torch.repeat_interleave(torch.arange(500), graph.colptr.diff().long())
    targets[graph.e_id.long()] = columns
    edge_index = torch.stack([sources, targets])

    seeds = torch.randperm(500, generator=torch.manual_seed(seed))[:20]
    out = NeighborSampler(graph, [4, 3], replace=replace).sample(seeds, seed=seed)
    assert torch.equal(out.n_id[out.edge_index], edge_index[:, out.e_id])  # every edge exists
    assert torch.equal(out.n_id[:20], seeds)
    assert out.n_id.unique().numel() == out.n_id.numel()
    assert sum(out.num_sampled_nodes) == out.n_id.numel()
    assert sum(out.num_sampled_edges) == out.e_id.numel()
    if not replace:
        assert out.e_id.unique().numel() == out.e_id.numel()
    # Hop h has the nodes found by hop h - 1 as targets, each with min(degree, fan-out) edges.
    degree = graph.colptr.diff().long()
    first_node, first_edge = 0, 0
    for hop, fanout in enumerate([4, 3]):
        targets = torch.arange(first_node, first_node + out.num_sampled_nodes[hop])
        num_edges = out.num_sampled_edges[hop]
        into = out.edge_index[1, first_edge : first_edge + num_edges]
        counts = torch.bincount(into - first_node, minlength=targets.numel())
        available = degree[out.n_id[targets]]
        expected = torch.where(available > 0, fanout, 0) if replace else available.clamp(max=fanout)
        assert torch.equal(counts, expected)
        first_node += targets.numel()
        first_edge += num_edges


def chi_square_is_plausible(counts, expected):
    # One in ten thousand correct samplers would fail; the seeds are fixed.
    return stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("fanout", [1, 3, 11, 40])
@pytest.mark.parametrize("replace", [False, True])
def test_every_neighbour_is_equally_likely(fanout, replace):
    degree, rounds = 50, 4000
    star = CSCGraph(torch.stack([torch.arange(degree), torch.zeros(degree, dtype=torch.int64)]))
    sampler = NeighborSampler(star, [fanout], replace=replace)
    counts = torch.zeros(degree, dtype=torch.int64)
    for seed in range(rounds):
        counts += torch.bincount(
            sampler.sample(torch.tensor([0]), seed=seed).e_id, minlength=degree
        )
    expected = torch.full((degree,), rounds * fanout / degree)
    if replace:
        assert chi_square_is_plausible(counts.numpy(), expected.numpy())
    else:
        # Each count is binomial with p = fanout / degree, and they sum to a constant.
        p = fanout / degree
        statistic = float(((counts - expected) ** 2 / (expected * (1 - p))).sum())
        statistic *= (degree - 1) / degree
        assert 1e-4 < stats.chi2(degree - 1).cdf(statistic) < 1 - 1e-4


def test_every_pair_is_equally_likely():
    star = CSCGraph(torch.stack([torch.arange(6), torch.zeros(6, dtype=torch.int64)]))
    sampler = NeighborSampler(star, [2])
    counts = torch.zeros(6, 6)
    for seed in range(6000):
        a, b = sampler.sample(torch.tensor([0]), seed=seed).e_id.sort().values
        counts[a, b] += 1
    pairs = counts[torch.triu(torch.ones(6, 6), 1).bool()]
    assert pairs.sum() == 6000
    assert chi_square_is_plausible(pairs.numpy(), torch.full((15,), 400.0).numpy())


def test_nodes_are_sampled_independently():
    # Two nodes with the same ten neighbours: each pair of choices is equally likely.
    src = torch.arange(10).repeat(2)
    dst = torch.arange(2).repeat_interleave(10)
    sampler = NeighborSampler(CSCGraph(torch.stack([src, dst])), [1])
    counts = torch.zeros(100)
    for seed in range(10000):
        first, second = sampler.sample(torch.tensor([0, 1]), seed=seed).e_id.tolist()
        counts[10 * first + second - 10] += 1
    assert chi_square_is_plausible(counts.numpy(), torch.full((100,), 100.0).numpy())


@pytest.mark.parametrize("replace", [False, True])
def test_weights_are_odds(replace):
    weight = torch.tensor([1.0, 2.0, 0.0, 4.0, 3.0])
    edge_index = torch.stack([torch.arange(5), torch.zeros(5, dtype=torch.int64)])
    sampler = NeighborSampler(CSCGraph(edge_index, edge_weight=weight), [1], replace=replace)
    counts = torch.zeros(5)
    for seed in range(5000):
        counts[sampler.sample(torch.tensor([0]), seed=seed).e_id] += 1
    assert counts[2] == 0
    assert chi_square_is_plausible(
        counts[weight > 0].numpy(), (5000 * weight / 10)[weight > 0].numpy()
    )


def test_the_sample_does_not_depend_on_the_number_of_threads(threads):
    graph = random_graph(20000, 300000, seed=0)
    sampler = NeighborSampler(graph, [10, 10], seed=9)
    seeds = torch.arange(3000)
    threads(1)
    alone = sampler.sample(seeds)
    threads(4)
    together = sampler.sample(seeds)
    assert torch.equal(alone.n_id, together.n_id)
    assert torch.equal(alone.edge_index, together.edge_index)
    assert torch.equal(alone.e_id, together.e_id)
    other = sampler.sample(seeds, seed=10)
    assert not torch.equal(alone.e_id[: other.e_id.numel()], other.e_id[: alone.e_id.numel()])


def test_one_sampler_serves_many_threads():
    graph = random_graph(2000, 30000, seed=0)
    sampler = NeighborSampler(graph, [5, 5])
    seeds = [torch.randint(2000, (64,), generator=torch.manual_seed(i)) for i in range(8)]
    expected = [sampler.sample(s, seed=i) for i, s in enumerate(seeds)]
    wrong = []

    def work(i):
        for _ in range(20):
            out = sampler.sample(seeds[i], seed=i)
            if not torch.equal(out.n_id, expected[i].n_id):
                wrong.append(i)
            if not torch.equal(out.edge_index, expected[i].edge_index):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_small_batch_after_a_large_one_is_right():
    graph = random_graph(5000, 50000, seed=1)
    sampler = NeighborSampler(graph, [8, 8])
    for size in (4000, 1, 0, 3000, 2):
        seeds = torch.arange(size)
        out = sampler.sample(seeds, seed=size)
        assert_equals_reference(graph, sampler, out, seeds, size)


def test_the_graph_outlives_its_name():
    sampler = NeighborSampler(random_graph(100, 1000, seed=1), [-1])
    assert sampler.sample(torch.arange(100)).e_id.numel() == 1000


@pytest.mark.parametrize(
    ("seeds", "error", "said"),
    [
        (torch.tensor([0, 10]), IndexError, "seed 10 at position 1"),
        (torch.tensor([-1]), IndexError, "seed -1 at position 0"),
        (torch.tensor([0.0]), TypeError, "float32"),
        (torch.tensor([True]), TypeError, "bool"),
        (torch.tensor([[0]]), ValueError, r"\(1, 1\)"),
        ([0], TypeError, "list"),
    ],
)
def test_bad_seeds_are_refused_and_the_next_sample_is_right(seeds, error, said):
    sampler = NeighborSampler(random_graph(10, 40, seed=0), [3])
    before = sampler.sample(torch.tensor([4]))
    with pytest.raises(error, match=said):
        sampler.sample(seeds)
    assert torch.equal(sampler.sample(torch.tensor([4])).e_id, before.e_id)


@pytest.mark.parametrize(
    ("fanouts", "options", "error", "said"),
    [
        ([], {}, ValueError, "at least one hop"),
        ([-2], {}, ValueError, "-2.*below -1"),
        ([2**63], {}, ValueError, "past 2.63"),
        ([1.5], {}, TypeError, "1.5"),
        ([True], {}, TypeError, "True"),
        ([torch.tensor(2)], {}, TypeError, r"tensor\(2\)"),
        (5, {}, TypeError, "one entry per hop"),
        ([[1, 2]], {}, ValueError, "2 fan-outs but the graph has no relations"),
        ([1], {"last": True}, ValueError, "edge_time"),
    ],
)
def test_bad_options_are_refused(fanouts, options, error, said):
    with pytest.raises(error, match=said):
        NeighborSampler(random_graph(10, 40, seed=0), fanouts, **options)


def test_integers_of_numpy_are_integers():
    graph = random_graph(10, 40, seed=0)
    seeds = torch.tensor([4])
    plain = NeighborSampler(graph, [3, 2]).sample(seeds, seed=5)
    same = NeighborSampler(graph, [np.int64(3), np.int32(2)]).sample(seeds, seed=np.int64(5))
    assert torch.equal(plain.e_id, same.e_id)
    assert torch.equal(
        plain.e_id, NeighborSampler(graph, [3, 2]).sample(seeds, seed=5 + 2**64).e_id
    )
    with pytest.raises(TypeError, match=r"seed=1\.5 is no integer"):
        NeighborSampler(graph, [3]).sample(seeds, seed=1.5)
    with pytest.raises(TypeError, match=r"seed=0\.5 is no integer"):
        NeighborSampler(graph, [3], seed=0.5)
    with pytest.raises(TypeError, match="graph is a Tensor"):
        NeighborSampler(graph.row, [3])


def test_contradictions_are_refused():
    one = torch.zeros(2, 1, dtype=torch.int64)
    timed = CSCGraph(one, torch.tensor([0]), num_relations=2, edge_time=torch.tensor([1]))
    with pytest.raises(ValueError, match="chance"):
        NeighborSampler(timed, [1], last=True, replace=True)
    with pytest.raises(ValueError, match="sorted by type"):
        NeighborSampler(timed, [[1, 1]])
    with pytest.raises(ValueError, match="induced"):
        NeighborSampler(timed, [1], induced=True)
    with pytest.raises(ValueError, match="seed_time"):
        NeighborSampler(timed, [1]).sample(torch.tensor([0]))
    with pytest.raises(ValueError, match="seed_time"):
        NeighborSampler(CSCGraph(one), [1]).sample(torch.tensor([0]), seed_time=torch.tensor([0]))
    with pytest.raises(ValueError, match="one node set"):
        NeighborSampler(CSCGraph(one, num_nodes=(2, 1)), [1])
    unsorted = CSCGraph.from_csc(
        torch.tensor([0, 2]), torch.tensor([0, 0]), edge_type=torch.tensor([1, 0])
    )
    with pytest.raises(ValueError, match="sorted by type"):
        NeighborSampler(unsorted, [[1, 1]])


@pytest.mark.parametrize("last", [False, True])
def test_edges_of_one_time_are_all_seen_at_it_and_none_before(last):
    """Of equal times the later edge is the latest, as in a stable sort."""
    time = torch.tensor([5, 3, 3, 5, 3, 7])
    graph = CSCGraph(
        torch.stack([torch.arange(1, 7), torch.zeros(6, dtype=torch.long)]),
        num_nodes=7,
        edge_time=time,
    )
    order = torch.sort(time, stable=True).indices.tolist()
    for until in (2, 3, 4, 5, 6, 7, 8):
        there = [edge for edge in order if time[edge] <= until]
        for fanout in (1, 2, 4, -1):
            sampler = NeighborSampler(graph, [fanout], last=last)
            found = sampler.sample(torch.tensor([0]), seed_time=torch.tensor([until])).e_id.tolist()
            assert len(found) == (len(there) if fanout < 0 else min(fanout, len(there)))
            assert set(found) <= set(there)
            if last:
                assert found == there[len(there) - len(found) :]


def unmixed(z):
    """The number that `mix64` turns into `z`: each of its steps has an inverse."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        whole = z
        for _ in range(64 // shift):
            z = whole ^ (z >> shift)
        z = z * pow(factor, -1, 2**64) % 2**64
    return z


def seed_of_first_draw(bits, node):
    """The seed for which the first number drawn at `node`, in the first hop, is `bits`."""
    key = (unmixed(bits) - ref._GOLDEN) % 2**64
    for fork in (node, 0, 0):  # of the node, the relation, the hop
        key = (~unmixed(key) - ref._GOLDEN * (fork + 1)) % 2**64
    return unmixed(key)


@pytest.mark.parametrize("bits", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("total", [3.0, 1e-300, 0.3 + 0.3 + 0.3])
def test_the_ends_of_chance_take_edges_of_positive_weight(bits, total):
    """The largest number drawn is 1 when it is rounded, and there is no edge above the total."""
    node, seed = 2, seed_of_first_draw(bits, 2)
    stream = ref.Stream(ref.mix64(seed)).fork(0).fork(0).fork(node)
    assert stream.draw(0) == bits
    weights = torch.tensor([0, 0, *[total / 3] * 3, 0, 0, 7], dtype=torch.float64)
    targets = torch.tensor([node] * 7 + [3])
    graph = CSCGraph(torch.stack([torch.arange(8), targets]), num_nodes=8, edge_weight=weights)
    sampler = NeighborSampler(graph, [1], replace=True)
    expected = 2 if bits < 2 else 4 if bits == 2**64 - 1 else 3
    drawn = sampler.sample(torch.tensor([node]), seed=seed)
    assert drawn.e_id.tolist() == [expected]
    on_device = sampler.on_device(torch.device("cpu"))
    _, [edges] = on_device.sample([torch.tensor([node])], [None], seed)
    assert edges.read(graph)[1].tolist() == [expected]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_threads": 0}, ValueError, "num_threads=0 is too small"),
        ({"num_threads": -2}, ValueError, "num_threads=-2 is too small"),
        ({"num_threads": 1.5}, TypeError, "num_threads=1.5 is no integer"),
        ({"seed": "one"}, TypeError, "seed='one' is no integer"),
    ],
)
def test_numbers_that_a_sample_cannot_be_drawn_with_are_refused(options, error, said):
    sampler = NeighborSampler(CSCGraph(torch.tensor([[0, 1], [1, 2]]), num_nodes=3), [2])
    with pytest.raises(error, match=said):
        sampler.sample(torch.tensor([1]), **options)


@pytest.mark.parametrize("hetero", [False, True])
def test_a_graph_that_another_process_maps_is_read_where_it_is_then(hetero):
    graph = random_graph(500, 5000, seed=0, edge_weight=torch.rand(5000))
    kind = ("node", "to", "node")
    sampler = HeteroNeighborSampler({kind: graph}, [5]) if hetero else NeighborSampler(graph, [5])
    seeds = torch.arange(50)

    def drawn():
        out = sampler.sample({"node": seeds} if hetero else seeds)
        return out.n_id["node"] if hetero else out.n_id

    before, at = drawn(), graph.row.data_ptr()
    sent = pickle.loads(ForkingPickler.dumps(sampler))  # as to a worker
    assert graph.row.data_ptr() != at
    there = next(iter(sent.graphs.values())) if hetero else sent.graph
    assert there.row.data_ptr() == graph.row.data_ptr()  # one copy
    gone = [torch.full_like(values, 1) for values in graph.arrays()]  # in the memory that was freed
    assert torch.equal(drawn(), before)
    del gone


def test_a_graph_stays_where_it_is_read_while_another_thread_shares_it():
    size = 40
    buffer = HostBuffer(8 * size)
    there = weakref.ref(buffer)
    row = torch.frombuffer(memoryview(buffer), dtype=torch.int64).copy_(torch.arange(size) % 10)
    graph = CSCGraph.from_csc(torch.arange(0, size + 1, 4), row)
    del buffer, row
    sampler, seen = NeighborSampler(graph, [-1]), []
    before = sampler.sample(torch.arange(10)).edge_index
    addresses, core, *held = sampler._core

    class Slow:
        def sample(self, **options):
            with ThreadPoolExecutor(1) as other:
                other.submit(ForkingPickler.dumps, graph).result()
                other.submit(sampler.sample, torch.arange(10)).result()
            seen.append(there() is not None)
            return core.sample(**options)

    sampler._core = (addresses, Slow(), *held)
    del held
    assert torch.equal(sampler.sample(torch.arange(10)).edge_index, before)
    gc.collect()
    assert seen == [True] and there() is None
