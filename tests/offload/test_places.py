"""Which directories are spilled to, on which rank; and those that cannot be."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.offload.places import spill_directories


def test_names_of_ranks_are_filled_in_and_made(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    made = spill_directories([f"{tmp_path}/a/{{rank}}", f"{tmp_path}/disk{{local_rank}}"])
    assert made == [tmp_path / "a/5", tmp_path / "disk1"]
    assert all(path.is_dir() for path in made)


def test_plain_names_are_neither_changed_nor_made(tmp_path):
    assert spill_directories(None) == []
    assert spill_directories(tmp_path / "gone") == [tmp_path / "gone"]
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("name", ["~/spill", "$HOME/spill", "${HOME}/spill", "~/{rank}", "spill"])
def test_names_are_what_they_are_in_a_shell(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RANK", "spill")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spill").mkdir()
    for spill in (name, Path(name)):
        (found,) = spill_directories(spill)
        assert found.samefile(tmp_path / "spill")
        ActivationOffload(nn.Linear(4, 4), spill).close()


@pytest.mark.parametrize("name", ["{node}", "{}", "{rank", "${UNSET_BY_ANYONE}"])
def test_other_placeholders_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"only \{rank\} and \{local_rank\}"):
        spill_directories(tmp_path / name)


def test_a_directory_in_memory_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr("dataeff.offload.places.filesystem_of", lambda directory: "tmpfs")
    with pytest.warns(RuntimeWarning, match="tmpfs, which is memory"):
        ActivationOffload(nn.Linear(4, 4), tmp_path).close()


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no tmpfs at /dev/shm")
def test_a_real_tmpfs_is_recognised():
    with pytest.warns(RuntimeWarning, match="/dev/shm is on tmpfs"):
        ActivationOffload(nn.Linear(4, 4), "/dev/shm").close()


def test_a_folder_removed_while_in_use_does_no_harm(tmp_path, gradients, assert_same):
    model, x = nn.Sequential(nn.Linear(128, 128), nn.Tanh()), torch.randn(128, 128)
    expected = gradients(model, lambda: model(x).sum().backward())
    (folder := tmp_path / "spill").mkdir()
    offload = ActivationOffload(model, folder, min_bytes=0)
    shutil.rmtree(folder)

    def step():
        with offload:
            loss = model(x).sum()
            offload._cache.drain()
            loss.backward()

    assert_same(gradients(model, step), expected)
    assert offload.report().bytes_read > 0
    with pytest.raises(FileNotFoundError, match="spill"):
        ActivationOffload(model, folder)


def test_a_read_only_folder_is_refused(tmp_path):
    nobody = 65534
    tmp_path.chmod(0o555)
    tmp_path.parent.chmod(0o755)
    tmp_path.parent.parent.chmod(0o755)
    user = os.geteuid()
    if user == 0:  # root may write anywhere
        os.seteuid(nobody)
    try:
        if not os.access(tmp_path, os.X_OK, effective_ids=True):
            pytest.skip("the folders of this run cannot be entered by another user")
        with pytest.raises(PermissionError, match=str(tmp_path)):
            ActivationOffload(nn.Linear(4, 4), tmp_path)
    finally:
        if user == 0:
            os.seteuid(0)
        tmp_path.chmod(0o755)


@pytest.mark.parametrize(
    ("kind", "error", "remedy"),
    [
        ("/proc", FileNotFoundError, "no file can be made there.*name a directory on an SSD"),
        ("/sys", PermissionError, "no file can be made there.*name a directory on an SSD"),
        ("fifo", NotADirectoryError, "name a directory on an SSD"),
        ("file", NotADirectoryError, "name a directory on an SSD"),
        ("missing", FileNotFoundError, "make it first"),
    ],
)
def test_a_place_where_nothing_can_be_spilled_is_named_with_a_remedy(tmp_path, kind, error, remedy):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    place = tmp_path / kind  # itself where `kind` is absolute
    with pytest.raises(error, match=remedy) as refused:
        ActivationOffload(nn.Linear(4, 4), place)
    assert refused.value.filename == str(place)


@pytest.mark.parametrize(
    ("spill", "error"),
    [("", ValueError), (5, TypeError), (b"x", TypeError), ([None], TypeError), ([b"x"], TypeError)],
)
def test_what_names_no_directory(spill, error):
    with pytest.raises(error, match="spill="):
        ActivationOffload(nn.Linear(4, 4), spill)
