"""`FeatureTable` against plain indexing, and what it does with bad input."""

import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import dataeff
from dataeff import _core
from dataeff.features.gather import gather

ROWS = 20


@pytest.fixture
def x():
    return torch.rand(ROWS, 3, 5)


SELECTIONS = [
    7,
    -ROWS,
    slice(None),
    slice(3, 15, 4),
    slice(-4, None),
    slice(12, 3),
    range(2, 9),
    [],
    [1, -2, 1],
    [True, False] * (ROWS // 2),
    np.array([3, 4, -1]),
    np.array([3, 4], dtype=np.int32),
    np.arange(6)[::-2].copy()[::-1],
    np.int64(4),
    torch.tensor(6),
    torch.tensor([[0, -1], [5, 5]]),
    torch.arange(ROWS, dtype=torch.int32),
    torch.arange(ROWS) % 3 == 0,
    torch.zeros(ROWS, dtype=torch.bool),
    torch.empty(0, 4, dtype=torch.long),
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: repr(s)[:40])
def test_selects_what_the_tensor_selects(x, selection):
    rows = dataeff.FeatureTable(x)[selection]
    plain = list(selection) if isinstance(selection, range) else selection
    if isinstance(selection, np.ndarray):
        plain = selection.copy()  # torch refuses negative strides
    assert torch.equal(rows, x[plain])


@given(
    st.slices(ROWS).filter(lambda s: s.step is None or s.step > 0),
)
@settings(deadline=None)
def test_any_slice(selection):
    x = torch.arange(ROWS)
    assert torch.equal(dataeff.FeatureTable(x)[selection], x[selection])


@pytest.mark.parametrize(
    ("selection", "error", "words"),
    [
        (torch.tensor([1.0]), TypeError, "float32"),
        (torch.tensor([1], dtype=torch.uint8), TypeError, "uint8"),
        (torch.tensor([1, 0], dtype=torch.int16), TypeError, r"int16: use \.long\(\) of row"),
        (torch.tensor([1, 0]).to_sparse(), TypeError, "dense tensor, got torch.sparse_coo"),
        (torch.ones(ROWS, dtype=torch.bool, device="meta"), ValueError, "on meta"),
        ({1, 2}, TypeError, "got a set"),
        ({0: 1}, TypeError, "got a dict"),
        (iter([1]), TypeError, "got a list_iterator"),
        ([[1], [2, 3]], TypeError, "of one shape; got a list"),
        ([0.5], TypeError, "float"),
        ((1, 2), TypeError, "rows alone"),
        (None, TypeError, "None"),
        (..., TypeError, "Ellipsis"),
        ("3", TypeError, "'3'"),
        (ROWS, IndexError, f"index {ROWS} .* {ROWS} rows"),
        (-ROWS - 1, IndexError, f"index -{ROWS + 1} "),
        (2**70, IndexError, f"index {2**70} .* {ROWS} rows"),
        ([1, 2**70], IndexError, f"{2**70}.* {ROWS} rows"),
        ([True], IndexError, r"\(1,\).*needs shape \(20,\)"),
        (torch.ones(ROWS, 3, dtype=torch.bool), IndexError, r"\(20, 3\)"),
        (slice(None, None, -1), ValueError, "-1"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "small", "hot", "disk"])
def test_a_wrong_selection_is_named_and_the_table_goes_on(
    tmp_path, x, selection, error, words, kind
):
    with table_of(kind, x, tmp_path) as table:
        with pytest.raises(error, match=words):
            table[selection]
        assert torch.equal(table[0], x.half().float()[0] if kind == "small" else x[0])


def table_of(kind, x, folder):
    if kind == "disk":
        np.save(folder / "x.npy", x.numpy())
        return dataeff.FeatureTable.open(folder / "x.npy")
    options = {"plain": {}, "small": {"store": "fp16"}, "hot": {"hot": dataeff.HotRows(3)}}
    return dataeff.FeatureTable(x, **options[kind])


@pytest.mark.parametrize("kind", ["plain", "small", "hot", "disk"])
def test_wrong_calls_are_named_by_every_kind_of_table(tmp_path, x, kind):
    index = torch.tensor([1])
    with table_of(kind, x, tmp_path) as table:
        for call in (table.gather, table.prefetch):
            with pytest.raises(
                TypeError, match=r"got list: torch.as_tensor\(.*table\[...\] also takes"
            ):
                call([1, 2])
            with pytest.raises(ValueError, match="index is on meta"):
                call(index.to("meta"))
        with pytest.raises(TypeError, match=r"torch.bool: use mask.nonzero\(\)"):
            table.gather(torch.ones(len(x), dtype=torch.bool))
        for out, error in [
            (torch.empty(1, 3, 5, requires_grad=True), ValueError),
            (torch.empty(2, 3, 5), ValueError),
            (torch.empty(1, 3, 10)[..., ::2], ValueError),
            (torch.empty(1, 3, 5, device="meta"), ValueError),
            (torch.empty(1, 3, 5, dtype=torch.int32), TypeError),
            ([[1.0]], TypeError),
        ]:
            with pytest.raises(error):
                table.gather(index, out=out)
        for dtype, words in [(torch.int32, "torch.int32"), ("float32", "'float32'")]:
            with pytest.raises(
                TypeError, match=rf"dtype={words}: .* are delivered as torch\.float32"
            ):
                table.gather(index, dtype=dtype)
        for empty in (torch.empty(0, dtype=torch.int32), torch.empty(2, 0, dtype=torch.int64)):
            assert table.gather(empty).shape == (*empty.shape, 3, 5)
    for late in (lambda: table.gather(index), lambda: table.prefetch(index), lambda: len(table)):
        with pytest.raises(RuntimeError, match="closed"):
            late()
    table.close()


def test_reads_in_place_and_keeps_the_memory_alive():
    x = torch.zeros(4, 2)
    table = dataeff.FeatureTable(x)
    assert table.x.data_ptr() == x.data_ptr()
    x[2] = 5
    del x
    assert table[2].tolist() == [5, 5]


def test_what_it_is(x):
    table = dataeff.FeatureTable(x.half())
    assert (len(table), table.shape, table.dtype) == (ROWS, (ROWS, 3, 5), torch.float16)
    assert repr(table) == "FeatureTable([20, 3, 5], torch.float16)"


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([[1.0]], TypeError, r"got list: pass torch.as_tensor"),
        (torch.ones(3, 3).numpy(), TypeError, r"got ndarray: pass torch.as_tensor"),
        ("x.npy", TypeError, r"got str: FeatureTable.open\(path\) reads"),
        (dataeff.FeatureTable(torch.ones(3, 2)), TypeError, r"got FeatureTable: .* x\[:\] are"),
        (torch.rand(3, 3, device="meta"), ValueError, "meta"),
        (torch.rand(3, 3, requires_grad=True), ValueError, "detach"),
        (torch.rand(3, 4).t(), ValueError, "contiguous"),
        (torch.tensor(3.0), ValueError, "0-dimensional"),
        (torch.eye(3).to_sparse(), ValueError, "to_dense"),
        (
            torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
            ValueError,
            "to_padded_tensor",
        ),
        (torch.zeros(3, 2, dtype=torch.complex64).conj(), ValueError, "resolve_conj"),
        (torch._neg_view(torch.zeros(3, 2)), ValueError, "resolve_neg"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"store": "int8"}, {"hot": dataeff.HotRows(1)}], ids=str)
def test_what_no_table_is_made_of(x, error, words, options):
    with pytest.raises(error, match=words):
        dataeff.FeatureTable(x, **options)


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (5,), (1, 1)])
def test_small_and_empty_shapes(shape):
    x = torch.rand(shape)
    table = dataeff.FeatureTable(x)
    index = torch.arange(shape[0])
    assert torch.equal(table[index], x)
    assert table[index[:0]].shape == (0, *shape[1:])


def test_gather_into_a_buffer(x):
    out = torch.empty(4, 3, 5)
    index = torch.tensor([4, 4, 0, -1])
    assert dataeff.FeatureTable(x).gather(index, out=out) is out
    assert torch.equal(out, x[index])


def test_scatter_writes_the_rows(x):
    table, index = dataeff.FeatureTable(x), torch.tensor([3, -1])
    rows = torch.rand(2, 3, 5)
    assert table.scatter_(index, rows) is table
    assert torch.equal(x[index], rows)
    with pytest.raises(TypeError, match="float64"):
        table.scatter_(index, rows.double())
    with pytest.raises(ValueError, match="needs"):
        table.scatter_(index, rows[:1])
    with pytest.raises(ValueError, match="meta"):
        table.scatter_(index, rows.to("meta"))
    with pytest.raises(TypeError, match="rows are a tensor, got float"):
        table.scatter_(index, 1.0)


@pytest.mark.filterwarnings("ignore:.*not writable:UserWarning")
@pytest.mark.parametrize("options", [{}, {"hot": dataeff.HotRows(2)}], ids=str)
def test_memory_that_is_mapped_read_only_is_read_and_not_written(tmp_path, x, options):
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    table, row = dataeff.FeatureTable(torch.from_numpy(mapped), **options), torch.ones(1, 3, 5)
    assert torch.equal(table[3], x[3])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"mapped read-only.*mmap_mode='c'"):
            table.scatter_(torch.tensor([3]), row)
    own = np.load(tmp_path / "x.npy", mmap_mode="c")
    table = dataeff.FeatureTable(torch.from_numpy(own), **options)
    assert torch.equal(table.scatter_(torch.tensor([3]), row)[3], row[0])


def test_what_is_written_lies_apart_from_what_is_read(x):
    table, before = dataeff.FeatureTable(x), x.clone()
    with pytest.raises(ValueError, match="the memory of the table or the index"):
        table.gather(torch.tensor([1, 0]), out=x[:2])
    assert torch.equal(x, before)
    numbers = torch.arange(40).flip(0).view(20, 2)
    index = torch.arange(20)
    with pytest.raises(ValueError, match="the memory of the table or the index"):
        dataeff.FeatureTable(numbers).gather(index[:10], out=index.view(10, 2))
    table.scatter_(torch.tensor([1, 2, 3]), x[:3])  # each row moves on by one
    assert torch.equal(x[1:4], before[:3])


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("kind", ["plain", "small", "hot", "disk"])
def test_autograd_is_told_of_what_is_written(tmp_path, x, kind, unique):
    weight, buffer = torch.ones(3, 5, requires_grad=True), torch.empty(1, 3, 5)
    with table_of(kind, x, tmp_path) as table:
        loss = (table.gather(torch.tensor([1]), buffer, unique=unique) * weight).sum()
        table.gather(torch.tensor([2]), buffer, unique=unique)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with torch.inference_mode():
            table.gather(torch.tensor([2]), torch.empty(1, 3, 5), unique=unique)
        if kind in ("plain", "hot"):
            loss = (table.x[3] * weight).sum()
            table.scatter_(torch.tensor([3]), torch.zeros(1, 3, 5))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_stats_count_what_was_delivered(x):
    table = dataeff.FeatureTable(x)
    table[torch.arange(6).view(2, 3)]
    table.prefetch(torch.tensor([1])).wait()
    with pytest.raises(IndexError):
        table[99]
    stats = table.stats()
    assert (stats.num_gathers, stats.num_rows) == (2, 7)
    assert stats.nbytes == {"host->host": 7 * 15 * 4}


def test_prefetch_gives_rows_or_the_error(x):
    table = dataeff.FeatureTable(x)
    good, bad = table.prefetch(torch.tensor([5, -5])), table.prefetch(torch.tensor([50]))
    assert torch.equal(good.wait(), x[[5, -5]])
    assert good.wait() is good.wait()
    with pytest.raises(IndexError, match="50"):
        bad.wait()
    table.close()


def test_close_finishes_what_runs_and_cancels_the_rest(x, monkeypatch):
    started, go_on = threading.Event(), threading.Event()

    def slow_gather(*args):
        started.set()
        go_on.wait(30)
        return gather(*args)

    table = dataeff.FeatureTable(x)
    monkeypatch.setattr("dataeff.features.rows.gather", slow_gather)
    running, waiting = (table.prefetch(torch.tensor([i])) for i in range(2))
    started.wait(30)
    threading.Timer(0.05, go_on.set).start()
    table.close()
    assert torch.equal(running.wait(), x[[0]])
    with pytest.raises(RuntimeError, match="closed before this prefetch began"):
        waiting.wait()


def test_a_closed_table_says_so(x):
    with dataeff.FeatureTable(x) as table:
        pass
    for use in (lambda: table[0], table.prefetch, len, lambda: table.shape):
        with pytest.raises(RuntimeError, match="closed"):
            use(*([torch.tensor([0])] if use == table.prefetch else [table] if use is len else []))
    table.close()
    assert repr(table) == "FeatureTable(closed)"


def test_concurrent_gathers_and_closes(x):
    tables = [dataeff.FeatureTable(x) for _ in range(4)]
    index, failures = torch.randint(-ROWS, ROWS, (500,)), []

    def use(table):
        try:
            for _ in range(50):
                if not torch.equal(table[index], x[index]):
                    failures.append("wrong rows")
        except RuntimeError as error:
            if "closed" not in str(error):
                failures.append(error)

    threads = [threading.Thread(target=use, args=(table,)) for table in tables for _ in range(2)]
    for thread in threads:
        thread.start()
    for table in tables[:2]:
        table.close()
    for thread in threads:
        thread.join()
    assert not failures


def test_pickles(x):
    copy = pickle.loads(pickle.dumps(dataeff.FeatureTable(x)))
    assert torch.equal(copy[[1, 2]], x[[1, 2]])


def test_gathers_release_the_interpreter_lock():
    table, index = dataeff.FeatureTable(torch.rand(4096, 256)), torch.randint(4096, (20_000,))
    turns, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            turns[0] += 1

    other = threading.Thread(target=count)
    other.start()
    for _ in range(20):
        table[index]
    stop.set()
    other.join()
    assert turns[0] > 0


def test_compiles_as_one_graph(x):
    table = dataeff.FeatureTable(x)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(index):
        return table[index].sum(0) + table.gather(index + 1).sum(0)

    index = torch.tensor([0, 3])
    torch.testing.assert_close(step(index), x[index].sum(0) + x[index + 1].sum(0))


class Wrapper(torch.Tensor):
    """A tensor that says a shape and a dtype and has no memory, as PyG's `EdgeIndex` is one."""

    held: torch.Tensor

    def __new__(cls, held):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class Told(Wrapper):
    def as_tensor(self):
        return self.held


def test_wrappers_without_memory_are_unwrapped_or_refused(tmp_path, x):
    dataeff.convert(x, tmp_path / "x.npy")
    index = torch.tensor([3, 1])
    for table in (dataeff.FeatureTable(x), dataeff.FeatureTable.open(tmp_path / "x.npy")):
        assert torch.equal(table[Told(index)], x[index])
        assert torch.equal(table.prefetch(Told(index)).wait(), x[index])
        with pytest.raises(TypeError, match="the index is a Wrapper"):
            table[Wrapper(index)]
    for make in (dataeff.FeatureTable, dataeff.unified):
        assert torch.equal(make(Told(x))[index], x[index])
        with pytest.raises(TypeError, match="x is a Wrapper"):
            make(Wrapper(x))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("store", [None, "int8"])
def test_what_watches_or_changes_operators_finds_the_gather(x, store):
    """A gather on the host goes past the dispatcher only where nobody would notice."""
    table = dataeff.FeatureTable(x.float(), store=store)
    name = "gather" if store is None else "gather_stored"
    index = torch.tensor([[3, 1], [0, 3]])
    expected = table[index]
    with Seen() as seen:
        table[index]
    assert f"dataeff.{name}.default" in seen.names
    with torch.autograd.profiler.profile() as profile:
        table[index]
    assert f"dataeff::{name}" in [event.name for event in profile.function_events]
    traced = make_fx(lambda ids: table[ids])(index)
    assert torch.equal(traced(index.flip(0)), expected.flip(0))
    weighted = torch.func.grad(lambda weight: (table[index] * weight).sum())
    assert torch.allclose(weighted(torch.tensor(2.0)), expected.sum(), rtol=1e-4)


class Gathers(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, index):
        return self.table[index] * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exports(x, strict):
    program = torch.export.export(
        Gathers(dataeff.FeatureTable(x)), (torch.tensor([1, 2]),), strict=strict
    )
    assert torch.equal(program.module()(torch.tensor([3, 1])), x[[3, 1]] * 2)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:FutureWarning")
def test_a_traced_gather_is_a_gather(x):
    table = dataeff.FeatureTable(x)
    traced = torch.jit.trace(lambda ids: table[ids], (torch.tensor([3, 1]),))
    assert torch.equal(traced(torch.tensor([2, 2])), x[[2, 2]])


def test_registration_says_what_is_missing(x):
    if torch.cuda.is_available() and _core.cuda_built:
        pytest.skip("nothing is missing here")
    with pytest.raises(RuntimeError, match=r"CUDA"):
        dataeff.FeatureTable(x).register()
    with pytest.raises(RuntimeError, match=r"without CUDA|NVIDIA driver"):
        _core.HostRegistration(x.data_ptr(), x.nbytes)
    assert not _core.is_registered(x.data_ptr(), x.nbytes)


@pytest.mark.parametrize("options", [{}, {"store": "int8"}, {"hot": dataeff.HotRows(3)}], ids=str)
def test_fake_tensors_have_the_shape_alone(x, options):
    table = dataeff.FeatureTable(x, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = table[torch.zeros(7, 2, dtype=torch.int64)]
    assert rows.shape == (7, 2, 3, 5) and rows.dtype == torch.float32
    assert type(rows).__name__ == "FakeTensor"


def test_a_prefetch_fetches_repeated_rows_once():
    x = torch.arange(12.0).view(4, 3)
    index = torch.tensor([[3, 0], [-1, 3]])
    with dataeff.FeatureTable(x) as table:
        assert torch.equal(table.prefetch(index, unique=True).wait(), x[index])
        assert table.stats().num_rows == 3  # 3 and -1 are not told apart before they are read
        empty = table.prefetch(index[:0], unique=True).wait()
        assert empty.shape == (0, 2, 3)
