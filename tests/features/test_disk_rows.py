"""`FeatureTable.open` against plain indexing, under faults, forks and closes."""

import errno
import gc
import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataeff
from dataeff.storage import FaultPlan, uring_refusal

ROWS = 700


def engine_params():
    refused = uring_refusal()
    yield pytest.param("io_uring", marks=pytest.mark.skipif(bool(refused), reason=str(refused)))
    yield "threads"


@pytest.fixture(params=engine_params())
def engine(request):
    return request.param


@pytest.fixture
def x():
    return torch.randn(ROWS, 77)


@pytest.fixture
def path(tmp_path, x):
    np.save(tmp_path / "x.npy", x.numpy())
    return tmp_path / "x.npy"


@given(
    row=st.lists(st.integers(0, 40), max_size=2),
    num_rows=st.integers(1, 300),
    dtype=st.sampled_from([np.uint8, np.float16, np.int32, np.float64]),
    index=st.lists(st.integers(-(10**6), 10**6), max_size=200),
    int32=st.booleans(),
    cache=st.sampled_from([0, 8 << 10, 1 << 20]),
    depth=st.sampled_from([1, 3, 64]),
)
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape_dtype_and_index(
    tmp_path, engine, row, num_rows, dtype, index, int32, cache, depth
):
    array = np.random.default_rng(0).integers(0, 255, (num_rows, *row)).astype(dtype)
    np.save(tmp_path / "any.npy", array)
    index = torch.tensor(index, dtype=torch.int32 if int32 else torch.int64)
    index = index.remainder(2 * num_rows) - num_rows
    if array.nbytes // num_rows * 2 + 400 > cache:
        cache = 0
    open_ = dataeff.FeatureTable.open
    with open_(tmp_path / "any.npy", engine=engine, cache_bytes=cache, queue_depth=depth) as table:
        for _ in range(2):  # the second time from the cache, as far as it goes
            assert torch.equal(table[index], torch.from_numpy(array)[index.long()])


def test_rows_on_disk_are_sent_and_not_shared(path):
    with (
        dataeff.FeatureTable.open(path) as table,
        pytest.raises(TypeError, match=r"in no host memory .*send the table as it is"),
    ):
        table.share_()


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (1, 1), (3,)])
def test_empty_tables_and_rows(tmp_path, engine, shape):
    np.save(tmp_path / "x.npy", np.ones(shape, np.float32))
    with dataeff.FeatureTable.open(tmp_path / "x.npy", engine=engine) as table:
        assert (len(table), tuple(table.shape), table.dtype) == (shape[0], shape, torch.float32)
        assert torch.equal(table[:], torch.ones(shape))
        assert table[[]].shape == (0, *shape[1:])
        with pytest.raises(IndexError, match=f"{shape[0]}"):
            table[shape[0]]


def test_rows_longer_than_a_read(tmp_path, engine):
    x = torch.randn(5, 60_000)
    np.save(tmp_path / "x.npy", x.numpy())
    with dataeff.FeatureTable.open(tmp_path / "x.npy", engine=engine, cache_bytes=0) as table:
        assert torch.equal(table[[4, 0, -2]], x[[4, 0, -2]])


def test_several_files_follow_one_another(tmp_path, engine, x):
    parts = [tmp_path / f"{i}.npy" for i in range(3)]
    for part, rows in zip(parts, x.split([100, 1, ROWS - 101]), strict=True):
        np.save(part, rows.numpy())
    with dataeff.FeatureTable.open(parts, engine=engine) as table:
        index = torch.randint(-ROWS, ROWS, (900,))
        assert torch.equal(table[index], x[index])
    np.save(parts[1], np.zeros((4, 76), np.float32))
    with pytest.raises(ValueError, match=r"1.npy has rows of .*\[76\], but .*0.npy.*\[77\]"):
        dataeff.FeatureTable.open(parts)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_rows_and_bytes_past_32_bits(tmp_path, engine, cache_bytes):
    num_rows, path = 3 * 2**30, tmp_path / "vast.npy"
    index = [2**31, 0, -1, 2**32 // 3, 2**31 - 1, -(2**31) - 7, num_rows - 2]
    rows = torch.arange(1, 22, dtype=torch.uint8).view(7, 3)
    with path.open("wb") as file:  # sparse: a few pages of its 9 GiB are ever there
        header = {"descr": "|u1", "fortran_order": False, "shape": (num_rows, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + 3 * num_rows)
        for row, data in zip(index, rows, strict=True):
            file.seek(start + row % num_rows * 3)
            file.write(data.numpy().tobytes())
    with dataeff.FeatureTable.open(path, engine=engine, cache_bytes=cache_bytes) as table:
        for _ in range(2):
            assert torch.equal(table[index], rows)
        assert torch.equal(table[[-num_rows]], rows[[1]])
        with pytest.raises(IndexError, match=f"index {num_rows} at position 0"):
            table[num_rows]


@pytest.mark.parametrize("cache_bytes", [0, 3 << 20])
@pytest.mark.parametrize("width", [1 << 18, (5 << 18) + 1])  # 1 MiB; past 4, and no whole pages
def test_rows_of_a_mebibyte_and_more(tmp_path, engine, cache_bytes, width):
    if cache_bytes and width > 1 << 18:
        cache_bytes *= 5
    x, path = torch.randn(4, width), tmp_path / "wide.npy"
    np.save(path, x.numpy())
    with dataeff.FeatureTable.open(path, engine=engine, cache_bytes=cache_bytes) as table:
        for index in ([3, 0, 3], [1, 2, 0], [-1]):
            assert torch.equal(table[index], x[index])
        assert (table.stats().disk.num_hits > 0) == (cache_bytes > 0)


def test_bfloat16_from_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    x = torch.randn(50, 9, dtype=torch.bfloat16)
    library.save_file({"x": x, "y": torch.zeros(3)}, tmp_path / "x.safetensors")
    with dataeff.FeatureTable.open(tmp_path / "x.safetensors", name="x") as table:
        assert torch.equal(table[[3, -1, 3]], x[[3, -1, 3]])


def test_into_a_buffer(path, x):
    with dataeff.FeatureTable.open(path) as table:
        out, index = torch.empty(2, 2, 77), torch.tensor([[1, -1], [5, 5]])
        assert table.gather(index, out=out) is out
        assert torch.equal(out, x[index])
        for wrong, error, words in [
            (out[:1], ValueError, "needs"),
            (out.double(), TypeError, "float64"),
            (out.transpose(0, 1), ValueError, "contiguous"),
        ]:
            with pytest.raises(error, match=words):
                table.gather(index, out=wrong)
        with pytest.raises(TypeError, match="float"):
            table.gather(torch.zeros(3))


def test_a_wrong_index_is_named_before_anything_is_read(path):
    with dataeff.FeatureTable.open(path) as table:
        out = torch.full((2, 77), 7.0)
        for wrong in (ROWS, -ROWS - 1):
            with pytest.raises(IndexError, match=f"index {wrong} .*{ROWS} rows"):
                table.gather(torch.tensor([0, wrong]), out=out)
        assert (out == 7).all()
        assert table.stats().num_rows == 0


def test_stats_tell_the_cache_from_the_disk(path, x):
    row = 77 * 4
    with dataeff.FeatureTable.open(path, cache_bytes=10 << 20) as table:
        table[[0, 1, 1, 600]]
        table[[1, 2]]
        stats = table.stats()
    assert (stats.num_gathers, stats.num_rows) == (2, 6)
    assert stats.nbytes == {"disk->host": 5 * row, "host->host": row}
    assert (stats.disk.num_hits, stats.disk.num_misses, stats.disk.num_reads) == (1, 5, 3)
    assert stats.disk.num_cache_rows == ROWS
    assert 5 * row <= stats.disk.nbytes_read <= 3 * 4096


def test_duplicates_are_read_once(path):
    with dataeff.FeatureTable.open(path, cache_bytes=0) as table:
        table[[5] * 1000]
        assert table.stats().disk.num_reads == 1


@pytest.mark.parametrize(
    ("rows", "reads"),
    [
        ([0, 1], [2]),  # pages that touch
        ([0, 2], [3]),  # a hole of one page is read along
        ([0, 3], [1, 1]),  # a longer one is not
        (list(range(16)), [16]),  # 64 KiB is the longest request
        (list(range(17)), [16, 1]),
        ([*range(15), 16], [15, 1]),
        ([*range(14), 15, 15, 14, 15], [16]),
        ([63, 64], [1, 1]),  # of two files
    ],
)
def test_pages_are_read_together_as_far_as_it_pays(tmp_path, engine, rows, reads):
    """Rows are one page each, so that reads are counted in pages; 64 of them to a file."""
    x = torch.randint(256, (128, 4096), dtype=torch.uint8)
    paths = [dataeff.convert(part, tmp_path / f"{i}.npy") for i, part in enumerate(x.split(64))]
    with dataeff.FeatureTable.open(paths, cache_bytes=0, engine=engine) as table:
        assert torch.equal(table[rows], x[rows])
        disk = table.stats().disk
    assert disk.num_reads == len(reads)
    assert disk.nbytes_read == sum(reads) * 4096


def test_it_is_read_only_and_in_no_tensor(path, x):
    with dataeff.FeatureTable.open(path) as table:
        with pytest.raises(TypeError, match=r"read-only: .*dataeff.convert"):
            table.scatter_(torch.tensor([0]), x[:1])
        with pytest.raises(TypeError, match=r"table\[:\]"):
            _ = table.x


def test_prefetch(path, x, engine):
    table = dataeff.FeatureTable.open(path, engine=engine)
    index = torch.randint(ROWS, (10, 50))
    under_way = [table.prefetch(one) for one in index]
    for one, prefetch in zip(index, under_way, strict=True):
        assert torch.equal(prefetch.wait(), x[one])
    with pytest.raises(IndexError, match="9999"):
        table.prefetch(torch.tensor([9999])).wait()
    table.close()


def test_close_waits_for_the_prefetch_under_way_and_cancels_the_rest(path, x, engine):
    slow = FaultPlan().add("read", delay_s=0.2)
    table = dataeff.FeatureTable.open(path, engine=engine, faults=slow)
    first, second = table.prefetch(torch.tensor([3])), table.prefetch(torch.tensor([4]))
    while not slow.num_reads:
        pass
    table.close()
    assert torch.equal(first.wait(), x[[3]])
    with pytest.raises(RuntimeError, match="closed before this prefetch began"):
        second.wait()
    with pytest.raises(RuntimeError, match="closed"):
        table[0]
    table.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODATA])
def test_a_read_error_names_the_file_and_the_table_goes_on(path, x, engine, code):
    faults = FaultPlan().add("read", error=code, times=1)
    with dataeff.FeatureTable.open(path, engine=engine, faults=faults) as table:
        with pytest.raises(OSError, match=r"read of \d+ bytes at offset \d+ of .*x\.npy") as caught:
            table[torch.arange(0, ROWS, 40)]
        assert caught.value.errno == code
        index = torch.arange(ROWS)
        assert torch.equal(table[index], x)


def test_short_and_interrupted_reads_go_on(path, x, engine):
    faults = (
        FaultPlan().add("read", max_nbytes=512, every=2).add("read", error=errno.EINTR, every=5)
    )
    with dataeff.FeatureTable.open(path, engine=engine, faults=faults, queue_depth=4) as table:
        assert torch.equal(table[:], x)
        assert faults.num_injected >= 5


def test_a_file_that_shrinks_is_an_end_of_file(path, x, engine):
    with dataeff.FeatureTable.open(path, engine=engine) as table:
        os.truncate(path, 8192)
        assert torch.equal(table[[0, 1]], x[[0, 1]])
        with pytest.raises(EOFError, match=r"x\.npy failed at offset \d+: the file ends there"):
            table[ROWS - 1]
        assert torch.equal(table[[2]], x[[2]])


def test_bad_options(path):
    open_ = dataeff.FeatureTable.open
    with pytest.raises(ValueError, match="queue_depth=0"):
        open_(path, queue_depth=0)
    with pytest.raises(ValueError, match="two rows"):
        open_(path, cache_bytes=10)
    with pytest.raises(ValueError, match="cache_bytes=-1 is too small"):
        open_(path, cache_bytes=-1)
    for option in ("queue_depth", "cache_bytes"):
        with pytest.raises(ValueError, match=f"{option}={10**30} is too large"):
            open_(path, **{option: 10**30})
    with pytest.raises(ValueError, match="engine='magic'"):
        open_(path, engine="magic")
    with pytest.raises(ValueError, match="at least one file"):
        open_([])
    with pytest.raises(TypeError, match=r"cache_bytes=1000000.0 is no integer"):
        open_(path, cache_bytes=1e6)


def open_descriptors():
    """What this process has open of tables: other tests' threads come and go meanwhile."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.endswith(".npy") or "io_uring" in name)


def test_nothing_stays_open(path, x):
    gc.collect()  # what earlier tests left goes now, not in between
    before = open_descriptors()
    with dataeff.FeatureTable.open(path) as table:
        table[:]
    for bad in ({"queue_depth": 0}, {"cache_bytes": 3}):
        with pytest.raises(ValueError):
            dataeff.FeatureTable.open(path, **bad)
    del table
    assert open_descriptors() == before


def test_pickles_by_path(path, x):
    with dataeff.FeatureTable.open(path) as table:
        copy = pickle.loads(pickle.dumps(table))
    assert torch.equal(copy[[1, -1]], x[[1, -1]])
    copy.close()


FORKED = ["threads", *([] if uring_refusal() else ["io_uring"])]


def _gather_in_child(table, index, done):
    done.put(table[index].clone().numpy().tobytes())


@pytest.mark.parametrize("engine", FORKED)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_workers_read_for_themselves(path, x, engine):
    context = torch.multiprocessing.get_context("fork")
    with dataeff.FeatureTable.open(path, engine=engine) as table:
        index = torch.arange(0, ROWS, 7)
        table[index[:3]]
        done = context.SimpleQueue()
        worker = context.Process(target=_gather_in_child, args=(table, index, done))
        worker.start()
        seen = done.get()
        worker.join(60)
        assert worker.exitcode == 0
        assert seen == x[index].numpy().tobytes()
        assert torch.equal(table[index], x[index])


def test_concurrent_gathers_prefetches_and_a_close(path, x, engine):
    table = dataeff.FeatureTable.open(path, engine=engine, cache_bytes=40 << 10, queue_depth=8)
    failures = []

    def use(seed):
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(40):
                index = torch.randint(-ROWS, ROWS, (200,), generator=generator)
                rows = table[index] if seed % 2 else table.prefetch(index).wait()
                if not torch.equal(rows, x[index]):
                    failures.append("wrong rows")
        except RuntimeError as error:
            if "closed" not in str(error) and "shutdown" not in str(error):
                failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    threads[1].join()
    table.close()
    for thread in threads:
        thread.join()
    assert not failures


LOST_RING = """
import os, sys, threading, time
import numpy as np
import torch
import dataeff
from dataeff.storage import FaultPlan

x = torch.from_numpy(np.load(sys.argv[1]))
slow = FaultPlan().add("read", delay_s=5e-3) if sys.argv[2] == "while it reads" else None
table = dataeff.FeatureTable.open(
    sys.argv[1], engine="io_uring", cache_bytes=0, faults=slow
)
index = torch.arange(0, len(x), 100)
assert torch.equal(table[index], x[index])

def lose():
    nothing = os.open("/dev/null", os.O_RDWR)
    links = {fd: f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")}
    rings = [fd for fd, link in links.items()
             if os.path.islink(link) and "io_uring" in os.readlink(link)]
    assert rings
    for fd in rings:
        os.dup2(nothing, int(fd))  # from now on io_uring_enter answers EOPNOTSUPP

if slow is None:
    lose()
else:
    before = slow.num_reads
    def once_it_reads():
        while slow.num_reads == before:
            time.sleep(1e-3)
        lose()
    other = threading.Thread(target=once_it_reads)
    other.start()
for _ in range(3):
    assert torch.equal(table[index], x[index])
if slow is not None:
    other.join()
    assert torch.equal(table[index], x[index])
print("same rows")
"""


@pytest.mark.skipif(uring_refusal() is not None, reason="no io_uring here")
@pytest.mark.parametrize("when", ["before it reads", "while it reads"])
def test_a_ring_that_the_kernel_refuses_gives_way_to_blocking_reads(tmp_path, when):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((20_000, 77)))
    done = subprocess.run(
        [sys.executable, "-c", LOST_RING, str(tmp_path / "x.npy"), when],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "same rows\n", (done.returncode, done.stderr)
