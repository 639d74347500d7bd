"""Hot rows: the choice, the account, the adaptive policy and the cost model, on the CPU."""

import contextlib
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dataeff
from dataeff import HotRows
from dataeff.features.adaptive import AdaptivePlacement
from dataeff.features.gather_stored import Source
from dataeff.features.hot import HotTier
from dataeff.features.hot_cost import hit_rate_curve, suggest_hot_rows
from dataeff.features.quantised import quantise

ROWS = 50


@pytest.fixture
def x():
    return torch.randn(ROWS, 6)


def zipf(num_rows, exponent=1.1):
    return torch.arange(1, num_rows + 1, dtype=torch.float64) ** -exponent


# --- static ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [None, "int8"])
@pytest.mark.parametrize("device_index", [torch.int32, torch.int64])
def test_rows_are_the_same_and_hits_are_counted(x, store, device_index):
    score = torch.rand(ROWS)
    table = dataeff.FeatureTable(x, hot=HotRows(10, score), store=store)
    plain = dataeff.FeatureTable(x, store=store)
    hot = score.topk(10).indices
    index = torch.randint(-ROWS, ROWS, (7, 9), dtype=device_index)
    assert torch.equal(table[index], plain[index])
    table.prefetch(index).wait()
    stats = table.stats()
    assert stats.num_hot_rows == 2 * torch.isin(index % ROWS, hot).sum()
    # A CPU has no tier but host memory, and the account does not claim another.
    assert stats.nbytes == {"host->host": 2 * plain.stats().nbytes["host->host"]}
    table.close()
    assert table.stats() == stats


@pytest.mark.parametrize("store", ["int8", "fp8", "fp16"])
@pytest.mark.parametrize("policy", ["static", "adaptive"])
def test_copies_on_a_gpu_are_the_rows_as_they_are_kept(x, store, policy, cuda_double, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda_double.current, "synchronize", lambda: None, raising=False)
    codes, scales = quantise(x, store)
    hot = HotRows(10, torch.rand(ROWS), policy=policy)
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda", 0)
        source = Source(codes, None if scales is None else scales.to(device))
        tier = HotTier(hot, source, device)
        assert tier.rows.shape == (10, 6) and tier.rows.dtype == codes.dtype
        assert tier.source().scales is source.scales


@pytest.mark.parametrize("policy", ["static", "adaptive"])
def test_an_index_on_the_cpu_asks_nothing_of_cuda(x, policy, monkeypatch):
    """In a child that was forked after CUDA was initialised every question is an error."""

    def refused():
        raise RuntimeError("CUDA error: initialization error")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refused)
    table = dataeff.FeatureTable(x, hot=HotRows(5, policy=policy, every=1), huge_pages=False)
    assert torch.equal(table[[3, 0, -1]], x[[3, 0, -1]])


def test_without_a_score_the_first_rows_are_hot(x):
    table = dataeff.FeatureTable(x, hot=HotRows(5))
    table[[0, 4, 5, -1, -ROWS]]
    assert table.stats().num_hot_rows == 3


@pytest.mark.parametrize("n", [0, ROWS, 10 * ROWS])
@pytest.mark.parametrize("policy", ["static", "adaptive"])
@pytest.mark.parametrize("scored", [False, True])
def test_none_and_all(x, n, policy, scored):
    hot = HotRows(n, torch.rand(ROWS) if scored else None, policy=policy, every=1)
    table = dataeff.FeatureTable(x, hot=hot)
    for _ in range(5):
        assert torch.equal(table[:], x)
    assert table.stats().num_hot_rows == (5 * ROWS if n else 0)


def test_equal_scores_are_chosen_by_position():
    assert HotRows(3, torch.tensor([1, 2, 2, 2, 2])).chosen(5).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: HotRows(-1), ValueError, "n=-1"),
        (lambda: HotRows(1, policy="lru"), ValueError, "'lru'"),
        (lambda: HotRows(1, every=0), ValueError, "every=0"),
        (lambda: HotRows(0.1), TypeError, "n=0.1 is no integer"),
        (lambda: HotRows(1, every=0.5), TypeError, "every=0.5 is no integer"),
        (lambda: dataeff.FeatureTable(torch.rand(4, 2), hot=2), TypeError, "hot=2 is no HotRows"),
        (lambda: HotRows(1, [1.0]), TypeError, r"list: torch\.as_tensor\(score\)"),
        (lambda: HotRows(1, torch.rand(2, 2)), ValueError, r"\(2, 2\)"),
        (lambda: HotRows(1, torch.tensor([float("nan")])), ValueError, "NaN"),
        (lambda: HotRows(1, torch.zeros(2, dtype=torch.cfloat)), TypeError, "complex"),
        (
            lambda: dataeff.FeatureTable(torch.rand(4, 2), hot=HotRows(1, torch.rand(3))),
            ValueError,
            "3 values but the table has 4 rows",
        ),
        (lambda: dataeff.FeatureTable(torch.rand(4, 2), sort="yes"), TypeError, "sort='yes'"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_wrong_index_counts_nothing(x):
    table = dataeff.FeatureTable(x, hot=HotRows(5, policy="adaptive", every=1))
    with pytest.raises(IndexError, match="50"):
        table[[0, 50]]
    assert table.stats().num_hot_rows == table.stats().num_gathers == 0


def test_scatter_pickle_and_repr(x):
    table = dataeff.FeatureTable(x, hot=HotRows(5, torch.rand(ROWS)), store="bf16")
    table.scatter_(torch.tensor([3]), torch.ones(1, 6))
    copy = pickle.loads(pickle.dumps(table))
    assert copy[3].tolist() == [1.0] * 6
    assert repr(HotRows(5, policy="adaptive")) == "HotRows(5, policy='adaptive')"


# --- unique and sorted reading --------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e5m2, torch.complex128]
)
@pytest.mark.parametrize("width", [(), (3,)])
def test_unique_spreads_rows_of_every_dtype(dtype, width):
    numbers = torch.arange(240, dtype=torch.uint8).view(dtype)[:15]
    table = dataeff.FeatureTable(numbers.view(-1, *width))
    index = torch.tensor([[4, -1, 4], [0, 0, 2]])
    rows = table.gather(index, unique=True)
    assert rows.dtype == dtype and rows.shape == (2, 3, *width)
    assert torch.equal(rows.view(-1).view(torch.uint8), table[index].view(-1).view(torch.uint8))


def test_unique_fetches_a_row_once(x):
    table = dataeff.FeatureTable(x)
    index = torch.tensor([[3, 3, -1], [49, 3, 0]])
    assert torch.equal(table.gather(index, unique=True), x[index])
    out = torch.empty(2, 3, 6)
    assert table.gather(index, out=out, unique=True) is out
    assert torch.equal(out, x[index])
    # -1 and 49 are one row by two names, and are fetched twice.
    assert table.stats().num_rows == 2 * 4
    assert table.gather(index[:0], unique=True).shape == (0, 3, 6)
    small = dataeff.FeatureTable(x, store="fp16")
    assert torch.equal(small.gather(index, unique=True, dtype=torch.float16), x.half()[index])
    for error, words, bad in (
        (ValueError, "contiguous", {"out": torch.empty(3, 2, 6)}),
        (ValueError, "contiguous", {"out": torch.empty(6, 3, 2).permute(2, 1, 0)}),
        (TypeError, "float64", {"out": out.double()}),
    ):
        with pytest.raises(error, match=words):
            table.gather(index, **bad, unique=True)
    with pytest.raises(IndexError, match="50"):
        table.gather(torch.tensor([50, 1]), unique=True)
    with pytest.raises(TypeError, match="float32"):
        table.gather(torch.tensor([1.0]), unique=True)


@pytest.mark.parametrize("sort", [True, False, "auto"])
def test_sort_is_only_an_order_of_reading(x, sort):
    index = torch.randint(-ROWS, ROWS, (4, 30))
    assert torch.equal(dataeff.FeatureTable(x, sort=sort)[index], x[index])


def test_places_are_where_the_rows_go(x):
    index, places = torch.randint(-ROWS, ROWS, (30,)), torch.randperm(30)
    source = (x, None, None, None, None)
    rows = torch.ops.dataeff.gather_stored(*source, places, index, torch.float32)
    assert torch.equal(rows[places], x[index])


# --- adaptive -------------------------------------------------------------------------------------


class Refuse(TorchDispatchMode):
    """Fails where an operation would make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item", "_to_cpu")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in self.WAITS), function
        return function(*args, **(kwargs or {}))


def follow(placement, index):
    move = placement.propose(index)
    placement.commit(move)


def hit_rate(placement, ids):
    return (placement.slots[ids] >= 0).double().mean().item()


def test_nothing_waits_for_the_device():
    placement = AdaptivePlacement(1000, torch.arange(64), torch.device("cpu"))
    with Refuse():
        for _ in range(20):
            follow(placement, torch.randint(1000, (500,)))
        with pytest.raises(AssertionError, match="nonzero"):
            placement.slots.nonzero()


def test_converges_to_the_static_optimum_and_follows_drift():
    torch.manual_seed(0)
    num_rows, num_hot = 20_000, 1000
    probability = zipf(num_rows)
    probability /= probability.sum()
    best = probability[:num_hot].sum().item()
    names = torch.randperm(num_rows)  # which row is how popular
    placement = AdaptivePlacement(num_rows, torch.arange(num_hot), torch.device("cpu"))

    def query():
        return names[probability.multinomial(2000, replacement=True)]

    assert hit_rate(placement, query()) < best / 2
    for _ in range(120):
        follow(placement, query())
    settled = hit_rate(placement, torch.cat([query() for _ in range(10)]))
    assert 0.9 * best < settled
    names = torch.randperm(num_rows)  # the taste changes
    dropped = hit_rate(placement, torch.cat([query() for _ in range(10)]))
    for _ in range(240):
        follow(placement, query())
    again = hit_rate(placement, torch.cat([query() for _ in range(10)]))
    assert dropped < best / 2 and again > 0.85 * best


def test_places_stay_consistent():
    torch.manual_seed(1)
    for num_hot in (1, 3, 16, 100, 299, 300):
        first = torch.randperm(300)[:num_hot]
        placement = AdaptivePlacement(300, first, torch.device("cpu"))
        memory = first.clone()  # stands for the rows: each slot's row number
        for _ in range(30):
            index = torch.randint(-350, 350, (int(torch.randint(1, 90, ())),))
            move = placement.propose(index)
            assert move.slots.unique().numel() == move.slots.numel()
            memory[move.slots] = move.rows
            placement.commit(move)
            assert torch.equal(memory, placement.held)
            assert placement.held.unique().numel() == num_hot
            found = (placement.slots >= 0).nonzero().view(-1)
            assert torch.equal(placement.held[placement.slots[found].long()], found)
            assert found.numel() == num_hot


def test_counts_leave_out_wrong_numbers_and_age():
    placement = AdaptivePlacement(10, torch.arange(2), torch.device("cpu"))
    placement.propose(torch.tensor([3, 3, -1, 10, -11, 2**40]))
    assert placement.counts.tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0, 1]
    for _ in range(14):  # 6 + 14 accesses: max(10 * 2, 10) of them halve the counts
        placement.propose(torch.tensor([5]))
    assert placement.counts.tolist() == [0, 0, 0, 1, 0, 7, 0, 0, 0, 0]


def test_a_run_repeats_exactly():
    def run():
        torch.manual_seed(3)
        placement = AdaptivePlacement(500, torch.arange(40), torch.device("cpu"))
        for _ in range(30):
            follow(placement, torch.randint(500, (200,)).clamp(max=250))
        return placement.held

    assert torch.equal(run(), run())


def test_the_table_follows_and_its_rows_stay_right(x):
    table = dataeff.FeatureTable(x, hot=HotRows(8, policy="adaptive", every=2))
    index = torch.arange(30, 36).repeat(4)
    for _ in range(80):
        assert torch.equal(table[index], x[index])
    before = table.stats().num_hot_rows
    table[index]
    assert table.stats().num_hot_rows - before == index.numel()


def test_the_memory_of_a_device_holds_the_rows_it_says(x):
    # The same class as on CUDA, its rows in host memory: what a kernel would read.
    hot = HotRows(8, torch.rand(ROWS), policy="adaptive", every=1)
    tier = HotTier(hot, Source(x), torch.device("cpu"))
    tier.rows = x[tier.placement.held].clone()
    for _ in range(40):
        tier.after(torch.randint(20, 32, (25,)))
        assert torch.equal(tier.rows, x[tier.placement.held])
    assert tier.num_moved() > 0
    x[25] = 7.0
    tier.copier(torch.tensor([25, ROWS - 1]))()
    assert torch.equal(tier.rows, x[tier.placement.held])


# --- how many -------------------------------------------------------------------------------------


def test_the_curve_is_the_share_of_the_largest():
    assert hit_rate_curve(torch.tensor([1, 0, 6, 3])).tolist() == [0, 0.6, 0.9, 1, 1]
    assert hit_rate_curve(torch.zeros(2)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="not negative"):
        hit_rate_curve(torch.tensor([-1.0]))


def test_suggests_what_fits_and_pays():
    score = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0])
    fast = {"link_gbs": 50.0, "device_gbs": 2000.0}
    two = HotRows.suggest(score, 100, 4 * 6 + 299, **fast)
    assert (two.num_rows, two.nbytes, two.hit_rate) == (2, 224, 0.75)
    assert two.speedup == pytest.approx(1 / (0.25 + 0.75 * 50 / 2000))
    every = suggest_hot_rows(score, 100, 10**6, **fast)
    assert (every.num_rows, every.hit_rate) == (5, 1.0)  # nobody asks for the sixth
    assert suggest_hot_rows(score, 100, 20, **fast).num_rows == 0
    # Of 16 accesses a row needs more than 1 / (1 - 50 / 2000) to pay for its filling.
    assert suggest_hot_rows(score, 100, 10**6, num_accesses=16, **fast).num_rows == 3
    assert suggest_hot_rows(score, 100, 10**6, num_accesses=0, **fast).num_rows == 0
    with pytest.raises(ValueError, match="0 and 1"):
        suggest_hot_rows(score, 100, 1, link_gbs=0, device_gbs=1)
    with pytest.raises(ValueError, match="budget"):
        suggest_hot_rows(score, 100, -1, **fast)
    with pytest.raises(TypeError, match="row_nbytes"):
        suggest_hot_rows(score, 0.5, 1, **fast)
    with pytest.raises(ValueError, match="nan"):
        suggest_hot_rows(score, 1, 1, link_gbs=float("nan"), device_gbs=1)
    with pytest.raises(TypeError, match="list"):
        suggest_hot_rows([1.0], 1, 1, **fast)
    with pytest.raises(ValueError, match="1, 6"):
        suggest_hot_rows(score[None], 1, 1, **fast)


@pytest.mark.parametrize("num_accesses", [None, 10**9])
def test_suggests_no_row_that_slower_memory_would_keep(num_accesses):
    score = torch.tensor([2.0, 1.0])
    for device_gbs in (50.0, 20.0):
        none = suggest_hot_rows(
            score, 8, 10**6, link_gbs=50.0, device_gbs=device_gbs, num_accesses=num_accesses
        )
        assert (none.num_rows, none.speedup) == (0, 1.0)
