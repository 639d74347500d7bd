"""Headers of table files: NumPy's and safetensors' own writers, and what is wrong with others."""

import json
import os
import socket
import struct

import numpy as np
import pytest
import torch

import dataeff
from dataeff.features.table_files import read_header


def npy(path, array, version=None):
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    return path


def safetensors(path, tensors):
    """Written by hand, so that this needs no library; `tensors`: name -> (dtype, shape, bytes)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy(tmp_path, version):
    path = npy(tmp_path / "x.npy", np.zeros((5, 3), np.float32), version)
    found = read_header(path)
    assert (found.shape, found.dtype, found.row_nbytes) == ((5, 3), torch.float32, 12)
    assert path.stat().st_size - found.offset == 60


@pytest.mark.parametrize("dtype", ["f2", "f8", "i1", "u1", "i2", "u2", "i8", "u8", "?", "c8"])
def test_dtypes_of_npy(tmp_path, dtype):
    array = np.zeros((2, 4), dtype)
    found = read_header(npy(tmp_path / "x.npy", array))
    assert found.dtype == torch.from_numpy(array).dtype


def test_a_column_counts_as_c_order(tmp_path):
    array = np.asfortranarray(np.zeros((5, 1), np.float32))
    assert read_header(npy(tmp_path / "x.npy", array)).shape == (5, 1)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.asfortranarray(np.zeros((5, 3))), "Fortran order.*dataeff.convert"),
        (np.zeros((5, 3), ">f4"), "byte order.*dataeff.convert"),
        (np.zeros((5, 3), "U4"), r"<U4, which no tensor has: .*convert\(array\.astype"),
        (np.zeros(5, [("a", "f4")]), r"which no tensor has: .*convert\(array\['a'\], path"),
        (np.float32(3), "0-dimensional"),
    ],
)
def test_arrays_that_are_no_table(tmp_path, array, words):
    with pytest.raises(ValueError, match=words):
        read_header(npy(tmp_path / "x.npy", np.asanyarray(array)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b"", "damaged header"),
        (lambda b: b"PK\x03\x04" + b[4:], "PK"),
        (lambda b: b[:6] + b"\x09" + b[7:], r"version 9\.0"),
        (lambda b: b[:40], "file ends after 30 of its 118"),
        (lambda b: b.replace(b"'shape'", b"'shope'"), "shape"),
        (lambda b: b.replace(b"(5, 3)", b"(5,-3)"), r"\(5, -3\)"),
        (lambda b: b.replace(b"(5, 3)", b"open()"), "open"),
        (lambda b: b.replace(b"False", b"'no' "), "fortran_order 'no'"),
        (lambda b: b.replace(b"(5, 3), }" + b" " * 15, b"(9223372036854775808, 0),"), "9223372036"),
        (lambda b: b[:-1], "truncated: it has 187 bytes.*need 188"),
    ],
)
def test_damaged_npy(tmp_path, damage, words):
    path = npy(tmp_path / "x.npy", np.zeros((5, 3), np.float32))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_safetensors_by_name(tmp_path):
    path = safetensors(
        tmp_path / "x.safetensors",
        {"a": ("BF16", [2, 3], bytes(12)), "b": ("F8_E4M3", [4], bytes(4))},
    )
    found = read_header(path, "b")
    assert (found.shape, found.dtype) == ((4,), torch.float8_e4m3fn)
    assert path.stat().st_size - found.offset == 4
    with pytest.raises(ValueError, match="2 tensors: give name=, one of 'a', 'b'"):
        read_header(path)
    with pytest.raises(KeyError, match="no tensor 'c'"):
        read_header(path, "c")


def test_safetensors_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    path = tmp_path / "x.safetensors"
    library.save_file({"only": torch.zeros(3, 4, dtype=torch.bfloat16)}, path)
    found = read_header(path)
    assert (found.shape, found.dtype) == ((3, 4), torch.bfloat16)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (("F32", [2, 3], bytes(20)), "20 bytes for F32"),
        (("F32", [2, -3], bytes(24)), "-3"),
        (("F4", [2, 3], bytes(24)), "F4, which no table holds"),
        (("F32", [], bytes(4)), "0-dimensional"),
    ],
)
def test_damaged_tensors(tmp_path, entry, words):
    with pytest.raises(ValueError, match=words):
        read_header(safetensors(tmp_path / "x.safetensors", {"x": entry}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "claims to be 0 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims to be"),
        (struct.pack("<Q", 2) + b"[]", "list"),
        (struct.pack("<Q", 2) + b"{,", "damaged"),
        (struct.pack("<Q", 10**5) + b"[" * 10**5, "damaged.*recursion"),
        (struct.pack("<Q", 10) + b'{"a": {}}\n', "dtype"),
    ],
)
def test_damaged_safetensors(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_header(path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": "dataeff-stripes", "version": 7}', "[" * 10**5]
)
def test_damaged_index(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="damaged header"):
        read_header(tmp_path / "x.json")


def test_other_mistakes(tmp_path):
    with pytest.raises(ValueError, match=r"x.csv: a table is opened from .npy"):
        read_header(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"only a \.safetensors file names tensors"):
        read_header(npy(tmp_path / "x.npy", np.zeros(3)), "x")


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        (None, TypeError, "got None"),
        (3, TypeError, "got 3"),
        (b"x.npy", TypeError, r"got b'x.npy': os.fsdecode\(path\)"),
        ([b"x.npy"], TypeError, r"os.fsdecode\(path\)"),
        ("https://host/x.npy", ValueError, "is a URL, and a table's files are local: download"),
        ("s3://bucket/x.npy", ValueError, "s3://bucket/x.npy is a URL"),
    ],
)
def test_what_is_no_local_path(path, error, words):
    with pytest.raises(error, match=words):
        dataeff.FeatureTable.open(path)
    if not isinstance(path, list):
        with pytest.raises(error, match=words):
            dataeff.convert(torch.zeros(3), path)


def not_a_file(folder, kind, suffix):
    """A path of that name at which there is no regular file, and what says so."""
    path = folder / f"{kind}{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link":
        path.symlink_to("gone.npy")
        return path, FileNotFoundError, r"it links to, gone\.npy, is not there: make the link anew"
    else:
        path.mkdir()
        return path, IsADirectoryError, r"opened from files: name those in this directory"
    return path, ValueError, rf"{kind}\{suffix} is a {kind}, and rows are read in any order"


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".json", ".parquet"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "link", "directory"])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind, suffix):
    path, error, words = not_a_file(tmp_path, kind, suffix)
    if suffix != ".parquet":
        with pytest.raises(error, match=words) as opened:
            dataeff.FeatureTable.open(path)
        assert str(path) in str(opened.value)
    else:
        pytest.importorskip("pyarrow")
    with pytest.raises(error, match=words) as converted:
        dataeff.convert(path, tmp_path / "x.npy")
    assert str(path) in str(converted.value)


def test_a_stripe_that_is_a_pipe_is_named_and_not_waited_for(tmp_path):
    index = dataeff.convert(torch.zeros(6, 4), tmp_path / "x.json", stripes=[tmp_path])
    (stripe,) = tmp_path.glob("*.rows")
    stripe.unlink()
    os.mkfifo(stripe)
    with pytest.raises(ValueError, match=r"\.rows is a pipe"):
        dataeff.FeatureTable.open(index)


def test_more_safetensors_that_are_no_table(tmp_path):
    path = tmp_path / "x.safetensors"
    for header, words in [
        ({}, r"x\.safetensors holds no tensor$"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "damaged.*'a'"),
    ]:
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(ValueError, match=words):
            read_header(path)


def test_a_stripe_of_another_table_is_refused(tmp_path):
    index = dataeff.convert(torch.zeros(6, 4), tmp_path / "x.json", stripes=[tmp_path])
    fields = json.loads(index.read_text())
    other = tmp_path / "other.rows"
    other.write_bytes(bytes(4096 + 6 * 16 + 1))
    same = tmp_path / "same.rows"
    same.write_bytes(bytes(4096 + 6 * 16))
    for files, words in [
        ([other.name], r"other\.rows is no stripe of .*x\.json: it has 4193 b.* 6 rows.* 4192"),
        ([same.name], r"same\.rows is not stripe 0 of 1 of table \w{32}, .*: it is no stripe"),
        (fields["files"] * 2, "a stripe is named twice"),
    ]:
        index.write_text(json.dumps(fields | {"files": files}))
        with pytest.raises(ValueError, match=words):
            read_header(index)


def test_stripes_that_changed_places_are_named(tmp_path):
    """Of one size, so that nothing but their heads tells them apart."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    one, other = (
        dataeff.convert(torch.full((1 << 18, 2), fill), tmp_path / name, stripes=folders)
        for fill, name in ((1.0, "one.json"), (2.0, "other.json"))
    )
    first, second = read_header(one).paths
    foreign = read_header(other).paths[0]
    assert first.stat().st_size == second.stat().st_size == foreign.stat().st_size
    kept = first.read_bytes()
    first.write_bytes(foreign.read_bytes())
    table_id, other_id = (json.loads(index.read_text())["table"] for index in (one, other))
    words = (
        f"{first} is not stripe 0 of 2 of table {table_id}.*is stripe 0 of 2 of table {other_id}"
    )
    with pytest.raises(ValueError, match=words):
        dataeff.FeatureTable.open(one)
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    with pytest.raises(ValueError, match=f"{first} is not stripe 0 of 2.*it is stripe 1 of 2"):
        dataeff.FeatureTable.open(one)
    # What an index names wrongly is not what overwriting takes away.
    dataeff.convert(torch.zeros(3, 2), one, stripes=folders, overwrite=True)
    assert first.exists() and second.exists() and foreign.exists()


def test_striped_tables_of_version_1_are_read(tmp_path):
    """Their stripes hold the rows and no more."""
    x, names = torch.randn(10, 3), ["a.rows", "b.rows"]
    for name, rows in zip(names, (x[[0, 1, 4, 5, 8, 9]], x[[2, 3, 6, 7]]), strict=True):
        (tmp_path / name).write_bytes(rows.numpy().tobytes())
    fields = {"format": "dataeff-stripes", "version": 1, "dtype": "float32", "shape": [10, 3]}
    fields |= {"rows_per_extent": 2, "files": names}
    (tmp_path / "x.json").write_text(json.dumps(fields))
    with dataeff.FeatureTable.open(tmp_path / "x.json") as table:
        assert torch.equal(table[:], x)


def test_rows_past_two_to_the_31_bytes_and_elements(tmp_path):
    path, shape = tmp_path / "x.npy", ((1 << 22) + 3, 1024)  # a sparse file of 4 GiB
    np.lib.format.open_memmap(path, "w+", np.uint8, shape).flush()
    rows = [0, (1 << 21) - 1, 1 << 21, 1 << 22, (1 << 22) + 2]
    with path.open("r+b") as file:
        for row in rows:
            file.seek(read_header(path).offset + row * 1024)
            file.write(bytes([row % 251 + 1]) * 1024)
    with dataeff.FeatureTable.open(path) as table:
        for dtype in (torch.int32, torch.int64):
            found = table[torch.tensor([*rows, 5, -1], dtype=dtype)]
            expected = [*(row % 251 + 1 for row in rows), 0, rows[-1] % 251 + 1]
            assert found.amin(1).tolist() == found.amax(1).tolist() == expected
