"""Rows straight from files by cuFile: a fake of it, and host memory for the GPU's."""

import errno

import numpy as np
import pytest
import torch

import dataeff
from dataeff.features import disk_rows
from dataeff.features.stats import Account


@pytest.fixture
def cufile(fake_cufile, monkeypatch):
    """The fake, in place of the library; it reads any bytes, so files are opened buffered."""
    monkeypatch.setattr("dataeff.storage.engine.cufile_library", lambda: fake_cufile.path)
    monkeypatch.setattr(disk_rows.os, "O_DIRECT", 0)
    return fake_cufile


@pytest.fixture
def x():
    return torch.randn(500, 3, 7)


def direct(table, index):
    """What a CUDA index makes of a table, with host memory for the GPU's."""
    out = torch.empty((*index.shape, *table.shape[1:]), dtype=table.dtype)
    account = Account()
    table._rows._gather_direct(index, out, account)
    return out, account.stats()


@pytest.mark.parametrize("kind", ["npy", "several", "stripes"])
def test_rows_are_those_of_the_table(tmp_path, cufile, x, kind):
    if kind == "stripes":
        folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
        for folder in folders:
            folder.mkdir()
        x = torch.randn(40_000, 3, 7)  # several extents of a MiB
        paths = [dataeff.convert(x, tmp_path / "x.json", stripes=folders)]
    else:
        parts = [x] if kind == "npy" else [x[:100], x[100:100], x[100:]]
        paths = [tmp_path / f"{i}.npy" for i in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            np.save(path, part.numpy())
    with dataeff.FeatureTable.open(paths, engine="cufile", queue_depth=5) as table:
        index = torch.randint(-len(x), len(x), (20, 15))
        index[0, :3] = torch.tensor([7, 7, 7 - len(x)])
        rows, stats = direct(table, index)
        assert torch.equal(rows, x[index])
        unique = len(index.remainder(len(x)).unique())
        assert stats.nbytes == {"disk->device": unique * 84} and stats.num_rows == 300
        assert cufile.num_reads >= unique
        assert direct(table, index[:0].int())[0].shape == (0, 15, 3, 7)
        assert torch.equal(table[index], x[index])  # a host index has its own way


def test_wrong_indices_and_failed_reads_are_named_and_others_go_on(tmp_path, cufile, x):
    np.save(tmp_path / "x.npy", x.numpy())
    with dataeff.FeatureTable.open(tmp_path / "x.npy", engine="cufile") as table:
        before = cufile.num_reads
        for wrong in (500, -501):
            with pytest.raises(IndexError, match=f"index {wrong} .* 500 rows: valid are -500"):
                direct(table, torch.tensor([1, wrong]))
        assert cufile.num_reads == before
        cufile.set(result=-5030)
        with pytest.raises(OSError, match=r"read of 84 bytes at offset .*x\.npy") as caught:
            direct(table, torch.arange(300))
        assert caught.value.errno == errno.EIO
        cufile.set(result=0)
        assert torch.equal(direct(table, torch.tensor([3]))[0], x[[3]])


def test_without_cufile_it_says_so(tmp_path, x, monkeypatch):
    np.save(tmp_path / "x.npy", x.numpy())
    monkeypatch.setattr("dataeff.storage.engine.cufile_library", lambda: str(tmp_path / "none.so"))
    with pytest.raises(OSError, match="cuFile cannot be loaded"):
        dataeff.FeatureTable.open(tmp_path / "x.npy", engine="cufile")
