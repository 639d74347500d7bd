"""`dataeff.convert`: what it writes, `FeatureTable.open` and the libraries of the formats read."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dataeff
from dataeff.features import conversion, row_sources, whole_files

DTYPES = [torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool]
WIDE_DTYPES = [*DTYPES, torch.bfloat16, torch.float8_e4m3fn]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks and extents of a few rows, so that small tables have many."""
    monkeypatch.setattr(row_sources, "CHUNK_NBYTES", 1000)
    monkeypatch.setattr(conversion, "EXTENT_NBYTES", 4096)


def table_of(path, **options):
    with dataeff.FeatureTable.open(path, **options) as table:
        return table[:]


def same(left, right):
    return left.dtype == right.dtype and torch.equal(
        left.view(torch.uint8), right.view(torch.uint8)
    )


@given(
    shape=st.lists(st.integers(1, 9), max_size=2).map(lambda row: (37, *row)),
    dtype=st.sampled_from(WIDE_DTYPES),
    suffix=st.sampled_from([".npy", ".safetensors", ".json"]),
)
@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30
)
def test_every_target_gives_the_rows_back(tmp_path, small_chunks, shape, dtype, suffix):
    x = torch.randint(0, 2, shape).to(dtype)
    stripes = [tmp_path / "a", tmp_path / "b"] if suffix == ".json" else []
    for folder in stripes:
        folder.mkdir(exist_ok=True)
    target = tmp_path / f"x{suffix}"
    if suffix == ".npy" and dtype not in DTYPES:
        with pytest.raises(ValueError, match=r"NumPy has no torch.*\.safetensors"):
            dataeff.convert(x, target, overwrite=True)
        return
    assert dataeff.convert(x, target, stripes=stripes, overwrite=True) == target
    rows = table_of(target)
    assert rows.shape == x.shape and same(rows.flatten(), x.flatten())


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (0,)])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".json"])
def test_empty_tables(tmp_path, shape, suffix):
    stripes = [tmp_path] if suffix == ".json" else []
    dataeff.convert(torch.zeros(shape), tmp_path / f"x{suffix}", stripes=stripes)
    assert table_of(tmp_path / f"x{suffix}").shape == shape


def test_the_libraries_read_it(tmp_path):
    x = torch.randn(11, 3)
    dataeff.convert(x, tmp_path / "x.npy")
    assert np.array_equal(np.load(tmp_path / "x.npy"), x.numpy())
    library = pytest.importorskip("safetensors.torch")
    dataeff.convert(x, tmp_path / "x.safetensors", name=None)
    assert torch.equal(library.load_file(tmp_path / "x.safetensors")["x"], x)


def test_rows_begin_on_a_page(tmp_path):
    from dataeff.features.table_files import read_header

    for suffix in (".npy", ".safetensors"):
        dataeff.convert(torch.zeros(3, 1024), tmp_path / f"x{suffix}")
        assert read_header(tmp_path / f"x{suffix}").offset % 4096 == 0


def sources(x, tmp_path):
    np.save(tmp_path / "s.npy", x.numpy())
    np.save(tmp_path / "f.npy", np.asfortranarray(x.numpy()))
    dataeff.convert(x, tmp_path / "s.safetensors")
    yield x.numpy()
    yield x.numpy().astype(">f4")
    yield np.asfortranarray(x.numpy())
    yield np.load(tmp_path / "s.npy", mmap_mode="r")
    yield x.t().contiguous().t()
    yield x.clone().requires_grad_()
    yield tmp_path / "s.npy"
    yield str(tmp_path / "f.npy")
    yield tmp_path / "s.safetensors"
    yield dataeff.FeatureTable(x)
    yield dataeff.FeatureTable.open(tmp_path / "s.npy")


def test_every_source(tmp_path, small_chunks):
    x = torch.randn(300, 5)
    for i, source in enumerate(sources(x, tmp_path)):
        assert torch.equal(table_of(dataeff.convert(source, tmp_path / f"{i}.npy")), x), source


def test_shards_become_one_file(tmp_path, small_chunks):
    parts = [np.random.rand(n, 9).astype(np.float32) for n in (70, 1, 0, 33)]
    paths = [tmp_path / f"{number}.npy" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        np.save(path, part)
    with dataeff.FeatureTable.open(paths) as shards:
        dataeff.convert(shards, tmp_path / "whole.npy")
    assert np.array_equal(np.load(tmp_path / "whole.npy"), np.concatenate(parts))


@pytest.mark.parametrize("view", [torch.conj, lambda z: z.conj().imag])
def test_lazy_views_are_written_as_their_values(tmp_path, view):
    x = view(torch.randn(9, 2, dtype=torch.complex64))
    assert torch.equal(table_of(dataeff.convert(x, tmp_path / "x.npy")), x)


def test_stripes_are_dealt_by_turns(tmp_path, small_chunks):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    x = torch.randn(1000, 100)
    target = dataeff.convert(x, tmp_path / "x.json", stripes=folders)
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    assert sum(sizes) == x.nbytes + 3 * 4096 and max(sizes) - min(sizes) <= 1024 * 400
    with dataeff.FeatureTable.open(target) as table:
        index = torch.randint(-1000, 1000, (500,))
        assert torch.equal(table[index], x[index])
    again = dataeff.convert(target, tmp_path / "y.npy")
    assert torch.equal(table_of(again), x)
    next(folders[1].iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="1-of-3"):
        dataeff.FeatureTable.open(target)


def test_stripes_below_the_index_move_with_it(tmp_path):
    (tmp_path / "set").mkdir()
    x = torch.randn(9, 4)
    dataeff.convert(x, tmp_path / "set" / "x.json", stripes=[tmp_path / "set"])
    (tmp_path / "set").rename(tmp_path / "moved")
    assert torch.equal(table_of(tmp_path / "moved" / "x.json"), x)


def test_overwriting(tmp_path):
    x = torch.randn(9, 4)
    for target, stripes in (("x.npy", []), ("x.json", [tmp_path])):
        dataeff.convert(x, tmp_path / target, stripes=stripes)
        before = len(list(tmp_path.iterdir()))
        with pytest.raises(FileExistsError, match=target):
            dataeff.convert(x, tmp_path / target, stripes=stripes)
        dataeff.convert(x + 1, tmp_path / target, stripes=stripes, overwrite=True)
        assert torch.equal(table_of(tmp_path / target), x + 1)
        assert len(list(tmp_path.iterdir())) == before
    dataeff.convert(tmp_path / "x.npy", tmp_path / "x.npy", overwrite=True)  # onto itself
    assert torch.equal(table_of(tmp_path / "x.npy"), x + 1)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".json"])
@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("nameless", [False, True])
def test_an_interrupted_write_leaves_nothing_and_harms_nothing(
    tmp_path, small_chunks, suffix, there, nameless, monkeypatch
):
    if not nameless:
        monkeypatch.setattr(whole_files, "open_without_name", lambda folder: None)
    x, target = torch.randn(500, 4), tmp_path / f"x{suffix}"
    stripes = [tmp_path] if suffix == ".json" else []
    if there:
        dataeff.convert(x, target, stripes=stripes)
    before = sorted(tmp_path.iterdir())

    def ctrl_c(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dataeff.convert(x * 2, target, stripes=stripes, progress=ctrl_c, overwrite=True)
    assert sorted(tmp_path.iterdir()) == before
    if there:
        assert torch.equal(table_of(target), x)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_file_systems_without_nameless_files_take_named_ones(tmp_path, monkeypatch, code):
    x, opened = torch.randn(9, 4), os.open

    def refuses(path, flags, *mode, **where):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(code, "no such files here")
        return opened(path, flags, *mode, **where)

    monkeypatch.setattr(os, "open", refuses)
    seen = []
    for name, options in [("x.npy", {}), ("x.npy", {"overwrite": True})]:
        dataeff.convert(
            x,
            tmp_path / name,
            progress=lambda done, total: seen.extend(path.name for path in tmp_path.iterdir()),
            **options,
        )
    assert any(name.endswith(".partial") for name in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
    assert torch.equal(table_of(tmp_path / "x.npy"), x)


@pytest.mark.parametrize("target", ["x.npy", "x.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_process_leaves_nothing(tmp_path, target, overwrite):
    if whole_files.open_without_name(tmp_path) is None:
        pytest.skip("this file system has no files without a name")
    stripes = [str(tmp_path)] if target.endswith(".json") else []
    if overwrite:
        dataeff.convert(torch.ones(9, 4), tmp_path / target, stripes=stripes)
    before = sorted(tmp_path.iterdir())
    code = f"""
import os, signal, dataeff, torch
kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)
target = {str(tmp_path / target)!r}
dataeff.convert(
    torch.zeros(9, 4), target, stripes={stripes}, overwrite={overwrite}, progress=kill
)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path):
    target, other = tmp_path / "x.npy", tmp_path / ".y.npy.1.partial"
    dataeff.convert(torch.ones(9, 4), target)
    other.write_bytes(b"of another target")
    code = f"""
import os, pathlib, signal, dataeff, torch
pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
dataeff.convert(torch.zeros(9, 4), {str(target)!r}, overwrite=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = set(tmp_path.iterdir()) - {target, other}
    assert left.name.endswith(".partial")
    assert torch.equal(table_of(target), torch.ones(9, 4))
    with open(left) as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as one who writes it still
        dataeff.convert(torch.zeros(9, 4), target, overwrite=True)
        assert left.exists()
    dataeff.convert(torch.zeros(9, 4), target, overwrite=True)
    assert sorted(tmp_path.iterdir()) == sorted([target, other])
    assert torch.equal(table_of(target), torch.zeros(9, 4))


KILLED = """
import os, pathlib, signal, sys, dataeff, torch
from dataeff.features import whole_files

target, folders, nameless = sys.argv[1], sys.argv[2:4], sys.argv[4] == "True"
if not nameless:
    whole_files.open_without_name = lambda folder: None


def convert_until(step, value):
    left = [step]

    def kill(event, arguments):
        if event in ("os.link", "os.rename", "os.remove"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        sys.addaudithook(kill)
        dataeff.convert(torch.full((9, 4), value), target, stripes=folders, overwrite=True)
        os._exit(0)
    return os.waitpid(child, 0)[1]


step, value = 0, 1.0
while convert_until(step, value):
    files = lambda: {str(p) for f in {pathlib.Path(target).parent, *map(pathlib.Path, folders)}
                     for p in f.iterdir() if p.is_file()}
    left = files()
    rows = dataeff.FeatureTable.open(target)[:].unique().tolist() if target in left else []
    assert rows in ([], [value], [value - 1]), rows
    assert convert_until(1000, value) == 0
    assert len(files()) == 1 + len(folders), (step, left, files())
    assert dataeff.FeatureTable.open(target)[:].unique().tolist() == [value]
    step, value = step + 1, value + 1
    if step % 2:  # now with a table to replace, now without
        for path in files():
            os.remove(path)
print(step)
"""


@pytest.mark.parametrize("nameless", [True, False])
def test_a_conversion_killed_while_it_names_stripes_is_cleared_by_the_next(tmp_path, nameless):
    if nameless and whole_files.open_without_name(tmp_path) is None:
        pytest.skip("this file system has no files without a name")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    arguments = [str(tmp_path / "x.json"), *map(str, folders), str(nameless)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5  # two stripes, an index, the old stripes


def test_a_note_removes_nothing_but_stripes(tmp_path):
    others = [tmp_path / "thesis.txt", tmp_path / "thesis.rows"]
    for other in others:
        other.write_text("years of work")
    (tmp_path / ".x.json.0.stripes").write_text(json.dumps([str(other) for other in others]))
    (tmp_path / ".x.json.1.stripes").write_text('["cut o')
    dataeff.convert(torch.ones(9, 4), tmp_path / "x.json", stripes=[tmp_path])
    assert all(other.read_text() == "years of work" for other in others)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("written", [7, 0])
def test_the_note_of_stripes_is_whole_after_short_writes_or_named(tmp_path, monkeypatch, written):
    """A full disk: it takes a part of the note, and then no more."""
    write, link, noted = os.write, os.link, []

    def short(fd, data):
        if not os.readlink(f"/proc/self/fd/{fd}").endswith(".stripes"):
            return write(fd, data)
        if not written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:written])

    def read_note(*arguments, **options):
        noted.extend(json.loads(next(tmp_path.glob(".x.json.*.stripes")).read_text()))
        link(*arguments, **options)

    monkeypatch.setattr(os, "write", short)
    monkeypatch.setattr(os, "link", read_note)
    if not written:
        with pytest.raises(OSError, match=r"No space left on device: .*\.x\.json\..*\.stripes"):
            dataeff.convert(torch.ones(9, 4), tmp_path / "x.json", stripes=[tmp_path])
        assert not list(tmp_path.iterdir())
        return
    dataeff.convert(torch.ones(9, 4), tmp_path / "x.json", stripes=[tmp_path])
    assert {*noted} == {str(path) for path in tmp_path.glob("*.rows")}


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_written_all_the_same(tmp_path, monkeypatch, code):
    def refuses(fd, operation):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuses)
    left = tmp_path / ".x.npy.1.partial"
    left.touch()
    dataeff.convert(torch.ones(9, 4), tmp_path / "x.npy")
    assert torch.equal(table_of(tmp_path / "x.npy"), torch.ones(9, 4))
    assert left.exists()  # who knows whose it is


def test_no_space_is_found_before_a_byte_is_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"no space for .*: File too large: .*x\.npy"):
            dataeff.convert(torch.zeros(100_000), tmp_path / "x.npy", progress=pytest.fail)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_files, "_reserve", lambda *_: None)  # a file system that cannot
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"x\.npy"):
            dataeff.convert(torch.zeros(100_000), tmp_path / "x.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "target", "options", "error", "words"),
    [
        (torch.zeros(3), "x.bin", {}, ValueError, "x.bin: a table is written to .npy"),
        (torch.zeros(3), "x.json", {}, ValueError, "needs their directories"),
        (torch.zeros(3), "x.npy", {"stripes": ["."]}, ValueError, "takes none"),
        (torch.zeros(3), "x.json", {"stripes": [".", "."]}, ValueError, "twice"),
        (torch.zeros(3), "x.json", {"stripes": "."}, TypeError, "stripes='.'"),
        (torch.tensor(3), "x.npy", {}, ValueError, "0-dimensional"),
        (torch.eye(3).to_sparse(), "x.npy", {}, ValueError, r"sparse_coo: use .to_dense\(\)"),
        (np.ma.masked_equal([1.0, 2.0], 1), "x.npy", {}, ValueError, "filled"),
        ("x.parquet", "x.npy", {"columns": "ab"}, TypeError, r"\['ab'\]"),
        (np.float32(3), "x.npy", {}, TypeError, "float32"),
        ([1, 2], "x.npy", {}, TypeError, r"list: .*FeatureTable.open\(sorted\(paths\)\)"),
        (["x.parquet"], "x.npy", {}, TypeError, "first convert each .parquet"),
        (".", "x.npy", {}, IsADirectoryError, r"FeatureTable.open\(sorted\(paths\)\)"),
        (np.zeros(3, "U3"), "x.npy", {}, ValueError, "<U3"),
        (torch.zeros(3, dtype=torch.complex64), "x.safetensors", {}, ValueError, "complex64"),
        (torch.zeros(3), "x.npy", {"columns": ["a"]}, ValueError, "only a .parquet"),
        (torch.zeros(3), "x.npy", {"name": "a"}, ValueError, "only a .safetensors"),
        ("missing.npy", "x.npy", {}, FileNotFoundError, "missing"),
        ("x.csv", "x.npy", {}, ValueError, "x.csv: .*pass the array"),
    ],
)
def test_mistakes(tmp_path, source, target, options, error, words):
    with pytest.raises(error, match=words):
        dataeff.convert(source, tmp_path / target, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_targets_that_are_no_place_for_a_file_are_found_before_a_row_is_read(tmp_path, overwrite):
    def never(done, total):
        raise AssertionError("it was written")

    folder, link = tmp_path / "folder.npy", tmp_path / "link.npy"
    folder.mkdir()
    link.symlink_to("gone.npy")
    with pytest.raises(IsADirectoryError, match=r"a directory: name a file.*/folder\.npy"):
        dataeff.convert(torch.zeros(3), folder, overwrite=overwrite, progress=never)
    if overwrite:
        dataeff.convert(torch.zeros(3), link, overwrite=True)
        assert not link.is_symlink() and link.is_file()
    else:
        with pytest.raises(FileExistsError, match=r"remove it or overwrite.*/link\.npy"):
            dataeff.convert(torch.zeros(3), link, progress=never)


def test_a_file_of_no_numbers_is_named(tmp_path):
    for name, array in {"fields": np.zeros(2, [("a", "f4")]), "lone": np.zeros(())}.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=rf"{name}\.npy"):
            dataeff.convert(tmp_path / f"{name}.npy", tmp_path / "x.npy")


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_quantised_tensors_are_refused(tmp_path):
    x = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with pytest.raises(ValueError, match=r"quint8.*dequantize"):
        dataeff.convert(x, tmp_path / "x.npy")


def test_any_source_goes_into_a_safetensors_target_by_name(tmp_path):
    x, target = torch.arange(6.0).view(3, 2), tmp_path / "x.safetensors"
    np.save(tmp_path / "x.npy", x.numpy())
    for source in (x, x.numpy(), dataeff.FeatureTable(x), tmp_path / "x.npy"):
        dataeff.convert(source, target, name="rows", overwrite=True)
        assert torch.equal(dataeff.FeatureTable.open(target, name="rows")[:], x)
    with pytest.raises(ValueError, match=r"name='rows': only a \.safetensors"):
        dataeff.convert(tmp_path / "x.npy", tmp_path / "y.npy", name="rows")


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dataeff.convert(torch.zeros(3), tmp_path / "nowhere" / "x.npy")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dataeff.convert(torch.zeros(3), tmp_path / "x.json", stripes=[tmp_path / "nowhere"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_is_named_by_the_target():
    with pytest.raises(OSError, match=r"'/proc/x\.npy'"):
        dataeff.convert(torch.zeros(3), "/proc/x.npy")


def parquet(path, **columns):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(arrow.table(columns), path, row_group_size=64)
    return path


def test_parquet_columns_and_lists(tmp_path, small_chunks):
    arrow = pytest.importorskip("pyarrow")
    x = torch.randn(200, 3)
    a, b, c = x.t().contiguous().numpy()
    path = parquet(tmp_path / "x.parquet", a=a, b=b, c=c)
    assert torch.equal(table_of(dataeff.convert(path, tmp_path / "x.npy")), x)
    some = dataeff.convert(path, tmp_path / "ca.npy", columns=["c", "a"])
    assert torch.equal(table_of(some), x[:, [2, 0]])
    one = dataeff.convert(path, tmp_path / "b.npy", columns=["b"])
    assert torch.equal(table_of(one), x[:, 1])
    lists = arrow.FixedSizeListArray.from_arrays(x.flatten().numpy(), 3)
    path = parquet(tmp_path / "y.parquet", rows=lists)
    assert torch.equal(table_of(dataeff.convert(path, tmp_path / "y.npy")), x)


@pytest.mark.parametrize("array", [np.asfortranarray(np.eye(3)), np.eye(3, dtype=">f4")])
def test_an_array_that_is_not_opened_is_written_again_in_its_place(tmp_path, array):
    path = tmp_path / "x.npy"
    np.save(path, array)
    with pytest.raises(ValueError, match=r"dataeff.convert\(path, path, overwrite=True\)"):
        dataeff.FeatureTable.open(path)
    dataeff.convert(path, path, overwrite=True)
    assert torch.equal(table_of(path), torch.eye(3, dtype=table_of(path).dtype))


def test_parquet_that_makes_no_table(tmp_path):
    path = parquet(tmp_path / "x.parquet", a=[1.0, None], b=["s", "t"], c=[1, 2], d=[1.5, 2.5])
    for columns, words in [
        (["a"], r"column 'a' \(double\) has nulls.*fill them or drop their rows"),
        (["b"], "'b' is string"),
        (["c", "d"], "several dtypes"),
        (["e"], "no column 'e'"),
        ([], "no column was chosen"),
    ]:
        with pytest.raises(ValueError, match=words):
            dataeff.convert(path, tmp_path / "x.npy", columns=columns)
    assert sorted(os.listdir(tmp_path)) == ["x.parquet"]
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"x\.parquet is damaged or no Parquet"):
        dataeff.convert(path, tmp_path / "x.npy")


@pytest.mark.parametrize("kind", ["bool", "uint16", "uint32", "uint64", "float16", "int8"])
@pytest.mark.parametrize("compression", ["NONE", "zstd"])
def test_parquet_numbers_of_every_kind(tmp_path, small_chunks, kind, compression):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    values = (np.arange(400) % 2).astype(kind).reshape(200, 2)
    columns = {"a": values[:, 0], "b": arrow.array(values[:, 1]).dictionary_encode()}
    for name, column in {"wide": list(values), "a": values[:, 0]}.items():
        columns[name] = arrow.array(column)
    path = tmp_path / "x.parquet"
    write_table(arrow.table(columns), path, row_group_size=7, compression=compression)
    for chosen, expected in [(["a"], values[:, 0]), (["b"], values[:, 1]), (["wide"], values)]:
        rows = table_of(dataeff.convert(path, tmp_path / "x.npy", columns=chosen, overwrite=True))
        assert same(rows, torch.from_numpy(expected.copy()))


def test_parquet_lists_of_one_length(tmp_path, small_chunks):
    """What pandas writes of a column of vectors is lists whose type says no length."""
    arrow = pytest.importorskip("pyarrow")
    x = torch.arange(600.0).view(200, 3)
    for kind in (arrow.list_(arrow.float32()), arrow.large_list(arrow.float32())):
        path = parquet(tmp_path / "x.parquet", v=arrow.array(x.tolist(), kind), s=x[:, 0].numpy())
        alone = dataeff.convert(path, tmp_path / "x.npy", columns=["v"], overwrite=True)
        assert torch.equal(table_of(alone), x)
        beside = dataeff.convert(path, tmp_path / "x.npy", columns=["s", "v"], overwrite=True)
        assert torch.equal(table_of(beside), torch.cat([x[:, :1], x], 1))
        rows = x.tolist()
        rows[170] = [1.0]
        path = parquet(tmp_path / "y.parquet", v=arrow.array(rows, kind))
        with pytest.raises(ValueError, match=r"'v' .*lists of 3 and, in row 170, of 1: pad"):
            dataeff.convert(path, tmp_path / "y.npy")
        path = parquet(tmp_path / "z.parquet", v=arrow.array([], kind))
        with pytest.raises(ValueError, match=r"'v' .*no rows that would say its length"):
            dataeff.convert(path, tmp_path / "z.npy")
        for rows in ([None, [1.0]], [[1.0], None], [[1.0], [None]]):
            path = parquet(tmp_path / "n.parquet", v=arrow.array(rows, kind))
            with pytest.raises(ValueError, match=r"'v' .*(has nulls|lists of 0)"):
                dataeff.convert(path, tmp_path / "n.npy")


def test_parquet_lists_of_no_number(tmp_path, small_chunks):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    empty = pa.array([[]] * 300, pa.list_(pa.float32(), 0))
    columns = {"a": empty, "b": pa.array(range(300), pa.float32()), "c": empty}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    pq.write_table(
        pa.table({"a": [[]] * 300}, pa.schema([("a", pa.list_(pa.int32()))])),
        tmp_path / "v.parquet",
    )
    expected = torch.arange(300.0)[:, None]
    assert same(table_of(dataeff.convert(tmp_path / "x.parquet", tmp_path / "x.npy")), expected)
    for source, chosen in (("x", ["a"]), ("x", ["a", "c"]), ("v", None)):
        target = tmp_path / f"{source}-{chosen}.npy"
        dataeff.convert(tmp_path / f"{source}.parquet", target, columns=chosen)
        assert table_of(target).shape == (300, 0)


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    twice = arrow.Table.from_arrays([arrow.array([float(i)]) for i in range(3)], ["a", "a", "b"])
    write_table(twice, tmp_path / "x.parquet")
    for columns in (None, ["a"]):
        with pytest.raises(ValueError, match=r"x\.parquet has several columns 'a': rename"):
            dataeff.convert(tmp_path / "x.parquet", tmp_path / "x.npy", columns=columns)
    assert table_of(
        dataeff.convert(tmp_path / "x.parquet", tmp_path / "x.npy", columns=["b"])
    ).tolist() == [2]


@pytest.mark.parametrize(
    "values",
    [[{"x": 1.0}], [np.datetime64("2020-01-01", "us")], [b"a"], [None], [[[1.0]]]],
    ids=["struct", "timestamp", "binary", "null", "nested list"],
)
def test_parquet_columns_that_are_no_numbers_are_named_with_their_type(tmp_path, values):
    arrow = pytest.importorskip("pyarrow")
    path = parquet(tmp_path / "x.parquet", odd=arrow.array(values))
    kind = str(arrow.array(values).type)
    with pytest.raises(ValueError, match=r"column 'odd' is .*choose others") as refused:
        dataeff.convert(path, tmp_path / "x.npy")
    assert kind.split("<")[0] in str(refused.value)


@pytest.mark.parametrize("damage", ["zeros", "cut off meanwhile"])
def test_damaged_parquet_is_named(tmp_path, damage):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "x.parquet"
    write_table(arrow.table({"a": np.random.default_rng(1).random(4 << 20)}), path, 1 << 16)
    data = bytearray(path.read_bytes())

    def cut(done, total):
        os.truncate(path, len(data) // 4)

    if damage == "zeros":
        data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.parquet is damaged or cannot be read"):
        row_sources_small(path, tmp_path / "x.npy", cut if damage != "zeros" else None)
    assert sorted(os.listdir(tmp_path)) == ["x.parquet"]


def row_sources_small(source, target, progress):
    """Converts by chunks that are shorter than what the file readers fetch ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_sources, "CHUNK_NBYTES", 1 << 16)
        dataeff.convert(source, target, progress=progress)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_npy_cut_off_meanwhile_is_an_error(tmp_path, order):
    """Read by a mapping it would end the process, with what was half written left behind."""
    source = tmp_path / "x.npy"
    np.save(source, np.asarray(np.ones((1000, 100)), order=order))

    def cut(done, total):
        os.truncate(source, 5000)

    with pytest.raises(EOFError, match=r"x\.npy was cut off: it has nothing at byte \d+"):
        row_sources_small(source, tmp_path / "y.npy", cut)
    assert sorted(os.listdir(tmp_path)) == ["x.npy"]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">i8", "|b1", "<f2", ">c8"])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (70, 3, 5), (1, 9), (7, 0), (0, 2)])
def test_npy_of_every_layout(tmp_path, small_chunks, order, dtype, shape):
    array = np.asarray(np.arange(np.prod(shape)).reshape(shape).astype(dtype), order=order)
    np.save(tmp_path / "x.npy", array)
    rows = table_of(dataeff.convert(tmp_path / "x.npy", tmp_path / "y.npy"))
    assert np.array_equal(rows.numpy(), array) and rows.numpy().dtype.isnative


def test_parquet_without_pyarrow_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        dataeff.convert(tmp_path / "x.parquet", tmp_path / "x.npy")


def test_the_index_is_text_a_person_can_read(tmp_path):
    dataeff.convert(torch.zeros(3, 2), tmp_path / "x.json", stripes=[tmp_path])
    fields = json.loads((tmp_path / "x.json").read_text())
    assert (fields["dtype"], fields["shape"]) == ("float32", [3, 2])
    assert (tmp_path / fields["files"][0]).is_file()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
def test_a_file_that_is_no_npy_is_named(tmp_path, content):
    source = tmp_path / "x.npy"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npy is damaged, or no \.npy file of numbers"):
        dataeff.convert(source, tmp_path / "y.npy")
    assert list(tmp_path.iterdir()) == [source]
