"""`HostEmbedding` against `torch.nn.Embedding(sparse=True)`, bit by bit."""

import copy
import gc
import pickle
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataeff
from dataeff import _core
from dataeff.features.row_gradient import GatherRows, sparse_row_gradient, sum_rows_by_segments
from dataeff.memory import HostBuffer
from dataeff.memory.shared import shared_buffer

sys.path.insert(0, str(Path(__file__).parent))
import table_processes as processes

ROWS, DIM = 12, 5
OPTIMIZERS = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.3),
    "Adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.3),
    "SparseAdam": lambda weights: torch.optim.SparseAdam(list(weights), lr=0.3),
}


def pair(padding_idx=None, dtype=torch.float32):
    torch.manual_seed(3)
    plain = torch.nn.Embedding(ROWS, DIM, padding_idx, sparse=True, dtype=dtype)
    torch.manual_seed(3)
    return plain, dataeff.HostEmbedding(ROWS, DIM, padding_idx, dtype=dtype)


def summed_in_order(index, rows, shape, padding_idx=None):
    """The gradient of a gather by the definition, one row after another."""
    sums = {}
    for row, values in zip(
        index.reshape(-1).tolist(), rows.reshape(index.numel(), *shape[1:]), strict=True
    ):
        row %= shape[0]
        if row != padding_idx:
            sums[row] = sums[row] + values if row in sums else values
    ids = torch.tensor(sorted(sums), dtype=torch.int64)
    values = torch.stack([sums[row] for row in sorted(sums)]) if sums else rows.new_empty(0)
    values = values.reshape(len(sums), *shape[1:])
    return torch.sparse_coo_tensor(
        ids[None], values, shape, check_invariants=True, is_coalesced=True
    )


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # Adagrad's own
@pytest.mark.parametrize("name", OPTIMIZERS)
@given(
    steps=st.lists(st.lists(st.integers(0, ROWS - 1), max_size=20), min_size=1, max_size=4),
    padding_idx=st.sampled_from([None, 0, -1]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    int32=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_trains_as_a_plain_embedding_bit_by_bit(name, steps, padding_idx, dtype, int32):
    plain, host = pair(padding_idx, dtype)
    assert torch.equal(plain.weight, host.weight)
    optimizers = [OPTIMIZERS[name](module.parameters()) for module in (plain, host)]
    for step in steps:
        index = torch.tensor(step, dtype=torch.int32 if int32 else torch.int64)
        weights = torch.rand(len(step), DIM, dtype=dtype)
        for module, optimizer in zip((plain, host), optimizers, strict=True):
            optimizer.zero_grad()
            rows = module(index)
            (rows * weights).sum().backward()
            if module is plain:
                once = module.weight.grad.coalesce()  # by a sort that leaves equals in any order
                grad = module.weight.grad
                rows = grad._values()
                module.weight.grad = summed_in_order(grad._indices()[0], rows, grad.shape)
                torch.testing.assert_close(module.weight.grad, once)
            optimizer.step()
        assert torch.equal(plain.weight, host.weight)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_a_penalty_on_the_gradient_has_a_gradient(padding_idx):
    penalties = []
    for module in pair(padding_idx, torch.float64):
        rows = module(torch.tensor([[3, 3, 1], [7, 1, 3]]))
        (grad,) = torch.autograd.grad(rows.pow(3).sum(), module.weight, create_graph=True)
        (rows.sum() + grad.to_dense().pow(2).sum()).backward(retain_graph=True)
        penalties.append(module.weight.grad.to_dense())
        module.weight.grad = None
        grad.coalesce().values().pow(2).sum().backward()  # which stays sparse throughout
        penalties.append(module.weight.grad.to_dense())
    torch.testing.assert_close(penalties[:2], penalties[2:])


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_dense_gradient_has_a_gradient(padding_idx):
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, -3, 2], [0, 0, 1]])

    def cubes(table):
        return GatherRows.apply(table, index, False, padding_idx).pow(3)

    assert torch.autograd.gradgradcheck(cubes, (table,))


@given(
    index=st.lists(st.integers(-300, 299), max_size=60),
    repeat=st.integers(1, 3),
    width=st.sampled_from([(), (0,), (1,), (7,), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    int32=st.booleans(),
    padding_idx=st.sampled_from([None, 0, 299]),
)
@settings(deadline=None, max_examples=100)
def test_gradients_are_summed_in_the_order_of_the_index(
    index, repeat, width, dtype, int32, padding_idx
):
    index = torch.tensor(index * repeat, dtype=torch.int32 if int32 else torch.int64)
    rows, shape = torch.randn(len(index), *width, dtype=dtype), torch.Size((300, *width))
    # Rows of half precision are summed in float32 and rounded once.
    summand = rows.float() if dtype.itemsize == 2 else rows
    expected = summed_in_order(index, summand, shape, padding_idx)
    grad = sparse_row_gradient(index, rows, shape, padding_idx)
    assert grad.is_coalesced() and grad.dtype == dtype
    assert torch.equal(grad.indices(), expected.indices())
    assert torch.equal(grad.values(), expected.values().to(dtype))


@pytest.mark.parametrize("rows", [5, 1 << 20])
@pytest.mark.parametrize("count", [1, 3000, 5000])
def test_many_rows_are_summed_by_threads_as_by_one(rows, count):
    index = torch.randint(-rows, rows, (count,))
    values, shape = torch.randn(count, 33), torch.Size((rows, 33))
    expected = summed_in_order(index, values, shape)
    grad = sparse_row_gradient(index, values, shape)
    assert torch.equal(grad.indices(), expected.indices())
    assert torch.equal(grad.values(), expected.values())


def test_what_the_core_does_not_sum_by_itself():
    index, rows = torch.tensor([1, 2, 1]), torch.randn(3, 4)

    def summed(index, rows, num_rows=5, padding=-1, new=None):
        return _core.sum_rows_tensors(index, rows, num_rows, padding, new or new_sums)

    def new_sums(size):
        return torch.empty(1, size, dtype=torch.int64), torch.empty(size, 4)

    ids, sums = summed(index, rows)
    assert ids.tolist() == [[1, 2]] and torch.equal(sums, torch.stack([rows[0] + rows[2], rows[1]]))
    assert summed(index, rows, padding=1)[0].tolist() == [[2]]
    for wrong in (
        (torch.tensor([1, 5, 1]), rows),
        (torch.tensor([1, -6, 1]), rows),
        (index, rows[:2]),
        (index, rows.half()),
        (index, torch.randn(3, 8)[:, ::2]),
        (index.repeat(2)[::2], rows),
        (index.double(), rows),
        (index, rows, 1 << 32),
        (index, rows, 5, -1, lambda size: (torch.empty(1, size), torch.empty(size, 4))),
        (index, rows, 5, -1, lambda size: (new_sums(size)[0], torch.empty(size, 3))),
        (index, rows, 5, -1, lambda size: new_sums(size)[0]),
        (index, rows, 5, -1, lambda size: new_sums(size + 1)),
        (index, rows, 5, -1, lambda size: 1 / 0),
    ):
        assert summed(*wrong) is None


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("times", [1, 2])
def test_optimizers_find_the_gradient_coalesced(count, times):
    """Or they would sort it and sum it once more."""
    host = dataeff.HostEmbedding(60, 3)
    for _ in range(times):
        host(torch.arange(count)).sum().backward()
    grad = host.weight.grad
    assert grad.is_coalesced() or count == 1
    assert grad._indices().is_contiguous() and grad._values().is_contiguous()
    dense = torch.zeros(60, 3)
    dense[:count] = times
    assert torch.equal(grad.to_dense(), dense)


def test_a_gradient_is_called_coalesced_only_where_it_is():
    host = dataeff.HostEmbedding(6, 3)
    for _ in range(3):  # one hook, however often it is called
        host(torch.tensor([4, 1])).sum().backward()
    assert len(host.weight._post_accumulate_grad_hooks) == 1
    other = torch.nn.functional.embedding(torch.tensor([4, 4]), host.weight, sparse=True)
    other.sum().backward()
    assert not host.weight.grad.is_coalesced()
    host.weight.grad = None
    torch.nn.functional.embedding(torch.tensor([4, 1]), host.weight, sparse=True).sum().backward()
    assert not host.weight.grad.is_coalesced()  # each once, but not in order
    assert _core.strictly_ascending(0, 0)
    for ids in ([3], [0, 1, 2**40], [1, 1], [*range(40), 39], [2, 1]):
        tensor = torch.tensor(ids)
        expected = ids == sorted(set(ids))
        assert _core.strictly_ascending(tensor.data_ptr(), len(ids)) == expected


@given(
    index=st.lists(st.integers(0, 5), max_size=30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_segments_sum_what_coalescing_sums(index, dtype):
    index = torch.tensor(index, dtype=torch.int64)
    rows = torch.rand(len(index), 2, 3, dtype=dtype)
    expected = sparse_row_gradient(index, rows, torch.Size((6, 2, 3)))
    unique, sums = sum_rows_by_segments(index, rows)
    assert torch.equal(unique, expected.indices()[0])
    torch.testing.assert_close(sums, expected.values())  # a long segment is summed in vectors
    assert torch.equal(sums, sum_rows_by_segments(index, rows)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_that_comes_often_has_all_of_its_gradient(dtype):
    index = torch.tensor([2, 5] * 1000)
    rows = torch.ones(2000, 3, dtype=dtype)
    grad = sparse_row_gradient(index, rows, torch.Size((6, 3)))
    for unique, sums in (
        sum_rows_by_segments(index, rows),
        (grad.indices()[0], grad.values()),
    ):
        assert unique.tolist() == [2, 5] and sums.dtype == dtype
        assert sums.tolist() == [[1000] * 3] * 2


def test_complex_rows_are_summed_on_every_device():
    index, rows = torch.tensor([2, 5, 2]), torch.randn(3, 4, dtype=torch.complex64)
    expected = torch.stack([rows[0] + rows[2], rows[1]])
    for where in (index, index.as_subclass(OnGpu)):
        grad = sparse_row_gradient(where, rows, torch.Size((6, 4)))
        assert torch.equal(grad.values(), expected)


class OnGpu(torch.Tensor):
    """Ids whose sums are made as on a GPU, where a wrong one has not been refused before."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("wrong", [6, 2**40, -7, -(2**40)])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_a_wrong_index_writes_no_gradient_beside_the_table(wrong, padding_idx):
    rows, shape = torch.rand(4, 3), torch.Size((6, 3))
    index = torch.tensor([0, wrong, 5, -6]).as_subclass(OnGpu)
    with pytest.raises(IndexError, match=rf"index {wrong} is out of range .* 6 rows"):
        sparse_row_gradient(index, rows, shape, padding_idx)


def test_threads_do_not_change_a_bit():
    index = torch.randint(0, 50, (4000,))
    rows = torch.randn(4000, 33)
    found = []
    before = torch.get_num_threads()
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        found.append(sparse_row_gradient(index, rows, torch.Size((50, 33))).to_dense())
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_scaled_loss_are_unscaled_as_documented(dtype):
    """By a power of two, so to the bit; a gradient that is infinite changes no row."""

    def train(scaler, factors):
        torch.manual_seed(4)
        rows = dataeff.HostEmbedding(ROWS, DIM, dtype=dtype)
        head = torch.nn.Linear(DIM, 2, dtype=dtype)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.3)
        rows_optimizer = torch.optim.SGD(rows.parameters(), lr=0.3)
        for factor in factors:
            optimizer.zero_grad(), rows_optimizer.zero_grad()
            loss = (head(rows(torch.tensor([3, 1, 3]))) * factor).float().sum()
            scaler.scale(loss).backward()
            rows.weight.grad /= scaler.get_scale()
            if rows.weight.grad.coalesce().values().isfinite().all():
                rows_optimizer.step()
            scaler.step(optimizer)
            scaler.update()
        return rows.weight.detach(), head.weight.detach()

    scaled = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    expected = train(torch.amp.GradScaler("cpu", enabled=False), [1.0, -0.5])
    for one, other in zip(train(scaled, [1.0, float("inf"), -0.5]), expected, strict=True):
        assert torch.equal(one, other)
    assert scaled.get_scale() == 2.0**9


def test_only_the_touched_rows_have_gradients():
    _, host = pair(padding_idx=2)
    host(torch.tensor([[4, 2], [4, -3]])).sum().backward()
    grad = host.weight.grad
    assert grad.is_sparse and grad.is_coalesced() and grad._indices().tolist() == [[4, ROWS - 3]]
    assert grad._values()[:, 0].tolist() == [2, 1] and grad.device.type == "cpu"


def test_gradients_in_float64():
    _, host = pair(dtype=torch.float64)
    index = torch.tensor([1, 3, 1])

    def loss(weight):
        return torch.func.functional_call(host, {"weight": weight}, index).sin()

    weight = host.weight.detach().clone().requires_grad_()
    with torch.no_grad():
        steps = []
        for place in range(weight.numel()):
            change = torch.zeros(weight.numel(), dtype=weight.dtype)
            change[place] = 1e-6
            change = change.view_as(weight)
            steps.append((loss(weight + change).sum() - loss(weight - change).sum()) / 2e-6)
    loss(weight).sum().backward()
    torch.testing.assert_close(weight.grad.to_dense(), torch.stack(steps).view_as(weight))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_norm": 1.0}, "max_norm=1.0"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
        ({"sparse": False}, "sparse=True"),
        ({"device": "meta"}, "host memory, not on meta"),
        ({"padding_idx": 3}, "padding_idx=3 is too large: at most 2"),
        ({"padding_idx": -4}, "padding_idx=-4 is too small: at least -3"),
        ({"_weight": torch.empty(3, 2, device="meta")}, "host memory, not on meta"),
    ],
)
def test_what_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        dataeff.HostEmbedding(3, 2, **arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, "float32"])
def test_a_dtype_without_gradients_is_named(dtype):
    with pytest.raises(TypeError, match=re.escape(f"dtype={dtype!r}")):
        dataeff.HostEmbedding(3, 2, dtype=dtype)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        ((-1, 2), ValueError, "num_embeddings=-1 is too small"),
        ((2, -3), ValueError, "embedding_dim=-3 is too small"),
        ((2.0, 2), TypeError, "num_embeddings=2.0 is no integer"),
        (("3", 2), TypeError, "num_embeddings='3' is no integer"),
        ((1 << 62, 1 << 10), OSError, f"take {1 << 74} bytes"),
    ],
)
def test_wrong_sizes_are_named(sizes, error, words, shared):
    with pytest.raises(error, match=words):
        dataeff.HostEmbedding(*sizes, shared=shared)


def test_sizes_of_other_integers():
    assert dataeff.HostEmbedding(np.int64(3), np.int32(2)).weight.shape == (3, 2)
    assert dataeff.HostEmbedding(0, 2).weight.shape == (0, 2)


@pytest.mark.parametrize("frozen", [False, True])
def test_transforms_are_refused_with_what_to_do(frozen):
    host, index = dataeff.HostEmbedding(5, 2), torch.tensor([[1, 2], [3, 4]])
    host.requires_grad_(not frozen)
    for run in (
        lambda: torch.func.vmap(host)(index),
        lambda: torch.func.grad(lambda scale: (host(index) * scale).sum())(torch.tensor(2.0)),
    ):
        with pytest.raises(NotImplementedError, match=r"rows = embedding\(index\)"):
            run()
    sums = torch.func.vmap(lambda rows: rows.sum())(host(index))
    assert torch.equal(sums, host.weight[index].sum((1, 2)))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), ()])
def test_rows_nobody_wants_gradients_of(shape):
    host = dataeff.HostEmbedding(5, 2)
    index = torch.randint(-5, 5, shape)
    assert host(index).requires_grad
    with torch.no_grad():
        rows = host(index)
    assert not rows.requires_grad and torch.equal(rows, host.weight.detach()[index])
    host.requires_grad_(False)
    assert not host(index).requires_grad and torch.equal(host(index), rows)


def test_bad_indices_are_named():
    _, host = pair()
    with pytest.raises(IndexError, match="12"):
        host(torch.tensor([0, ROWS]))
    with pytest.raises(TypeError, match="float32"):
        host(torch.tensor([0.5]))
    with pytest.raises(TypeError, match="got list"):
        host([0, 1])
    with pytest.raises(ValueError, match="index is on meta"):
        host(torch.tensor([0], device="meta"))
    assert host(torch.empty(0, 2, dtype=torch.long)).shape == (0, 2, DIM)


def test_rows_that_exist_are_taken_as_they_are():
    rows = torch.randn(5, 3)
    host = dataeff.HostEmbedding.from_pretrained(rows, freeze=False, padding_idx=2, sparse=True)
    assert host.weight.data_ptr() == rows.data_ptr() and host.padding_idx == 2
    assert host.weight.requires_grad
    for wrong, said in (
        ({"embeddings": torch.ones(3)}, r"\(3,\)"),
        ({"embeddings": torch.ones(3, 4).t()}, "contiguous"),
        ({"max_norm": 1.0}, "max_norm=1.0"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
        ({"sparse": False}, "sparse=True"),
    ):
        with pytest.raises(ValueError, match=said):
            dataeff.HostEmbedding.from_pretrained(**{"embeddings": rows, **wrong})
    with pytest.raises(TypeError, match="got FeatureTable"):
        dataeff.HostEmbedding.from_pretrained(dataeff.FeatureTable(rows))


def test_the_rows_stay_on_the_host():
    model = torch.nn.Sequential(dataeff.HostEmbedding(ROWS, DIM), torch.nn.Linear(DIM, 2))
    place = model[0].weight.data_ptr()
    model.to("meta")
    assert model[1].weight.device.type == "meta"
    assert model[0].weight.device.type == "cpu" and model[0].weight.data_ptr() == place
    model[0].double()
    assert model[0].weight.dtype == torch.float64 and model[0](torch.tensor([1])).dtype is not None


def test_state_goes_to_a_plain_embedding_and_back():
    plain, host = pair()
    place = host.weight.data_ptr()
    state = {name: value + 1 for name, value in plain.state_dict().items()}
    host.load_state_dict(state)
    assert torch.equal(host.weight, plain.weight + 1) and host.weight.data_ptr() == place
    plain.load_state_dict(host.state_dict())
    assert torch.equal(host.weight, plain.weight)
    for again in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert torch.equal(again.weight, host.weight)
        assert again.weight.data_ptr() != place
    rows = torch.rand(3, 2)
    pretrained = dataeff.HostEmbedding.from_pretrained(rows)
    assert pretrained.weight.data_ptr() == rows.data_ptr() and not pretrained.weight.requires_grad


@pytest.mark.parametrize("grad", [False, True])
def test_rows_stay_where_they_are_read_while_another_thread_shares_them(monkeypatch, grad):
    buffer = HostBuffer(64 * 4)
    there = weakref.ref(buffer)
    # No view, whose base would stay.
    rows = torch.frombuffer(memoryview(buffer), dtype=torch.float32)
    host = dataeff.HostEmbedding.from_pretrained(rows.resize_(16, 4).fill_(1), freeze=not grad)
    del rows, buffer
    seen = []

    def slow(*arguments):
        with ThreadPoolExecutor(1) as other:
            other.submit(host.share_memory).result()
        seen.append(there() is not None)
        return gather(*arguments)

    gather = _core.gather_tensors
    monkeypatch.setattr(_core, "gather_tensors", slow)
    assert (host(torch.arange(16)) == 1).all() and seen == [True]
    gc.collect()
    assert there() is None


def test_rows_in_shared_memory():
    assert shared_buffer(dataeff.HostEmbedding(ROWS, DIM, shared=True).weight) is not None
    plain = torch.nn.Sequential(dataeff.HostEmbedding(ROWS, DIM))
    plain.share_memory()
    assert shared_buffer(plain[0].weight) is not None


@pytest.mark.parametrize("resumed", [False, True], ids=["through", "resumed"])
@pytest.mark.parametrize("by_ddp", [True, False], ids=["ddp", "average_gradients"])
def test_two_ranks_train_as_one(tmp_path, by_ddp, resumed, rank_context):
    checkpoint = tmp_path / "model.pt" if resumed else None
    answers = rank_context.Queue()
    ranks = [
        rank_context.Process(
            target=processes.train_rank,
            args=(rank, tmp_path / "store", answers, by_ddp, checkpoint),
            daemon=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    found = dict(answers.get(timeout=100) for _ in ranks)
    for rank in ranks:
        rank.join(timeout=100)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    model = processes.ranker()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        model(processes.BATCHES[step].reshape(-1)).backward()
        optimizer.step()
    assert found[0] == found[1]
    torch.testing.assert_close(torch.tensor(found[0]), model.rows.weight.detach())


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_compiled_code_goes_on_around_it():
    _, host = pair()
    compiled = torch.compile(lambda index: host(index * 2) * 3, backend="aot_eager")
    index = torch.tensor([1, 2, 1])
    rows = compiled(index)
    assert torch.equal(rows, host.weight[index * 2] * 3)
    rows.sum().backward()
    assert host.weight.grad.coalesce().values()[:, 0].tolist() == [6, 3]


def test_gradients_are_clipped_by_the_norm_of_their_rows():
    ours, index = dataeff.HostEmbedding(20, 4), torch.tensor([1, 2, 2, 5])
    theirs = torch.nn.Embedding(20, 4, _weight=ours.weight.detach().clone())
    for module in (ours, theirs):
        (50 * module(index) ** 2).sum().backward()
    ours.weight.grad *= min(1.0, 1.0 / float(ours.weight.grad.coalesce().values().norm() + 1e-6))
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    torch.testing.assert_close(ours.weight.grad.to_dense(), theirs.weight.grad)


@pytest.mark.parametrize("grad", [False, True])
def test_fx_traces_it_as_a_leaf(grad):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleDict({"rows": dataeff.HostEmbedding(6, 3)})

        def forward(self, index):
            return self.parts["rows"](index + 1).relu()

    model = Model()
    with torch.set_grad_enabled(grad):
        traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "parts.rows"
    ]
    assert traced.parts.rows is model.parts["rows"]
    index = torch.tensor([0, 4])
    assert torch.equal(traced(index), model(index))
    traced(index).sum().backward()
    assert model.parts["rows"].weight.grad.coalesce().indices().tolist() == [[1, 5]]
