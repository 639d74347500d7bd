"""The order of streams around a gather on a stream of its own."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dataeff import FeatureTable
from dataeff.features.prefetch import prefetch_on_stream
from dataeff.features.rows import Rows

BEFORE = [("side", "waits for", "reader"), ("gather on", "side"), ("record", "side")]
AFTER = ("reader", "waits for event of", "side")


def begin(cuda):
    def gather():
        cuda.log.append(("gather on", cuda.current.name))
        return torch.ones(3)

    return prefetch_on_stream(cuda.stream("side"), torch.tensor([0]), gather)


def test_the_reader_waits_once_for_the_gather_and_the_gather_for_what_was_queued(cuda_double):
    cuda = cuda_double
    pending = begin(cuda)
    assert cuda.log == BEFORE
    assert pending.wait() is pending.wait()
    del pending
    assert cuda.log == [*BEFORE, AFTER]


def test_an_index_is_not_written_again_before_an_abandoned_gather_has_read_it(cuda_double):
    cuda = cuda_double
    pending = begin(cuda)
    cuda.current = cuda.stream("another")
    del pending
    assert cuda.log == [*BEFORE, AFTER]


def test_rows_read_by_another_stream_go_back_behind_it(cuda_double):
    cuda, rows = cuda_double, torch.ones(3)
    rows.record_stream = lambda stream: cuda.log.append(("rows stay for", stream.name))
    pending = prefetch_on_stream(cuda.stream("side"), torch.tensor([0]), lambda: rows)
    cuda.current = cuda.stream("another")
    cuda.log.clear()
    assert pending.wait() is rows
    assert cuda.log == [
        ("another", "waits for event of", "side"),
        ("reader", "waits for event of", "side"),
        ("rows stay for", "another"),
    ]


class LoggedRows(Rows):
    """Rows that say on which stream they are gathered, and into whose memory."""

    shape, dtype = torch.Size((5, 2)), torch.float32

    def __init__(self, cuda, asynchronous):
        self.cuda, self.asynchronous = cuda, asynchronous

    def gather(self, index, out, account):
        self.cuda.log.append(("gather on", self.cuda.current.name, tuple(out.shape)))
        return out

    def scatter_(self, index, rows): ...

    def register(self, device): ...

    def release(self): ...


class LoggedMemory(TorchDispatchMode):
    """Says on which stream memory is allocated."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.new_empty.default:
            self.cuda.log.append(("memory of", self.cuda.current.name))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_rows_are_in_the_memory_of_whoever_asked(cuda_double, asynchronous):
    """What a reader lets go while its kernels run may be taken again in its own order alone."""
    cuda = cuda_double
    with FeatureTable._over(LoggedRows(cuda, asynchronous)) as table:
        with FakeTensorMode(), LoggedMemory(cuda):
            index = torch.zeros(7, dtype=torch.int64, device="cuda")
            cuda.log.clear()
            pending = table.prefetch(index)
        assert pending.wait().shape == (7, 2)
    gathered = ("gather on", "side", (7, 2))
    assert cuda.log[0] == ("memory of", "reader") and cuda.log.count(gathered) == 1
    assert sum(entry[0] == "memory of" for entry in cuda.log) == 1
    ordered = cuda.log.index(gathered)
    if asynchronous:
        assert ("side", "waits for", "reader") in cuda.log[1:ordered]
    else:
        assert ("side", "waits for event of", "reader") in cuda.log[1:ordered]
        assert cuda.log[-1] == ("host waits for event of", "side")


def test_rows_of_a_thread_stay_for_another_reader_too(cuda_double, monkeypatch):
    cuda = cuda_double
    with FeatureTable._over(LoggedRows(cuda, asynchronous=False)) as table:
        with FakeTensorMode():
            pending = table.prefetch(torch.zeros(7, dtype=torch.int64, device="cuda"))
        table._prefetcher._executor.submit(lambda: None).result()  # the rows are there
        cuda.current = cuda.stream("another")
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda rows, stream: cuda.log.append(stream.name)
        )
        assert pending.wait().shape == (7, 2) and cuda.log[-1] == "another"
