"""BadIndices: what kernels count and what is raised of it. A CPU tensor stands for the GPU's."""

import threading

import pytest
import torch

from dataeff import FeatureTable
from dataeff.features import gather_cuda
from dataeff.features.gather_cuda import BadIndices


@pytest.fixture
def bad(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    bad = BadIndices.__new__(BadIndices)
    bad.device = torch.device("cpu")
    bad.count, bad.seen = torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    bad._begin()
    return bad


def meet(bad, count, value=7, num_rows=5):
    """What a kernel writes."""
    bad.count += count
    bad.seen[:] = torch.tensor([1, value, num_rows])


def test_each_wrong_index_is_raised_once(bad):
    bad.check()
    for count in (3, 1):
        meet(bad, count)
        with pytest.raises(IndexError, match=f"{count} wrong indices .* 7 for a table of 5 rows"):
            bad.check()
        bad.check()


def test_what_another_gather_meets_during_a_check_is_not_lost(bad, monkeypatch):
    meet(bad, 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: meet(bad, 1))
    with pytest.raises(IndexError, match="3 wrong indices"):
        bad.check()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    bad.seen[0] = 1  # a kernel's note of what has been raised already
    bad.check()
    meet(bad, 1)
    with pytest.raises(IndexError, match="1 wrong indices"):
        bad.check()


def test_a_forked_child_leaves_what_the_parent_s_gathers_met(bad, monkeypatch):
    """It may not even ask a device: a table that it closes would raise."""

    def refused(device):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    meet(bad, 1)
    monkeypatch.setattr(gather_cuda, "_bad_indices", {bad.device: bad})
    monkeypatch.setattr(torch.cuda, "synchronize", refused)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with FeatureTable(torch.eye(3)) as table:
        assert table[[1]].tolist() == [[0, 1, 0]]
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(IndexError, match="1 wrong indices"):
        table.check()


def test_threads_share_one_count(monkeypatch):
    both = threading.Barrier(2)
    monkeypatch.setattr(gather_cuda, "_bad_indices", {})
    monkeypatch.setattr(gather_cuda, "BadIndices", lambda device: both.wait(30) or object())
    found, device = [], torch.device("cuda", 0)
    threads = [
        threading.Thread(target=lambda: found.append(gather_cuda.bad_indices(device)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1] is gather_cuda.bad_indices(device)
