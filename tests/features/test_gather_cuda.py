"""BadIndices: what kernels count and what is raised of it. A CPU tensor stands for the GPU's."""

import contextlib
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dataeff import FeatureTable, _core
from dataeff.features import gather_cuda, gather_stored
from dataeff.features.gather_cuda import BadIndices
from dataeff.sampling import on_device


@pytest.fixture
def bad(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(gather_cuda, "capturing_anywhere", lambda devices: False)
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


@pytest.mark.parametrize("how", ["gather", "stored", "sample"])
def test_kernels_are_launched_with_their_device_as_the_current_one(monkeypatch, how):
    """The core would go back by cudaSetDevice, and start a context on a device that has none."""
    current, launched = [0], []

    @contextlib.contextmanager
    def on(device):
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    class Index:
        device, dtype, shape = torch.device("cuda", 1), torch.int64, (3,)
        is_cuda, is_cpu = True, False

        def contiguous(self):
            return self

        def data_ptr(self):
            return 64

        numel = element_size = data_ptr

    def launch(*arguments, **options):
        launched.append((current[0], arguments[-2:], options))

    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(gather_cuda, "bad_indices", lambda device: mock.MagicMock())
    monkeypatch.setattr(_core, "is_registered", lambda *span: current[0] == 1)
    monkeypatch.setattr(_core, "gather_cuda", launch)
    index, table = Index(), torch.zeros(5, 2)
    if how == "gather":
        gather_cuda.launch_gather(table, index, torch.zeros(3, 2))
    elif how == "stored":
        out = mock.Mock(shape=(3, 2), device=index.device, dtype=table.dtype)
        places = torch.tensor([2, 0, 1])
        gather_stored._gather_into_cuda(gather_stored.Source(table), places, index, out)
        assert launched[0][2]["places"] == places.data_ptr()
    else:
        on_device._run(mock.Mock(side_effect=AssertionError), launch, index)
    assert current == [0]
    assert launched[0][:2] == (1, (1, 77))
