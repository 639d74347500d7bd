"""Aliases of host memory, which keep its owner."""

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.features import unified_memory
from dataeff.features.unified_memory import DLPACK_CPU, UnifiedMemory, _Loan, byte_alias


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    start=st.integers(0, 5),
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.uint8, torch.bool, torch.bfloat16, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_an_alias_has_the_elements_of_any_view(rows, columns, start, step, dtype):
    x = torch.randint(0, 2, (rows, columns)).to(dtype).t()[start % columns :: step]
    alias = byte_alias(x, DLPACK_CPU, 0, None)
    assert torch.equal(alias, x) and alias.stride() == x.stride() and alias.dtype == dtype
    alias.fill_(1)
    assert (x == 1).all()


@pytest.mark.parametrize("view", [torch.conj, lambda z: z.conj().imag, lambda z: z.conj()[1:, 0]])
def test_an_alias_of_a_lazy_view_has_its_values(view):
    x = view(torch.randn(3, 2, dtype=torch.complex64))
    alias = byte_alias(x, DLPACK_CPU, 0, None)
    assert torch.equal(alias, x) and alias.data_ptr() == x.data_ptr()


def test_an_alias_keeps_its_owner_until_it_is_gone():
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    x = torch.ones(3)
    alias = byte_alias(x, DLPACK_CPU, 0, owner)
    capsule = unified_memory._core.alias_capsule(x.data_ptr(), 12, 1, 0, owner)
    del owner
    view = alias[1:]
    del alias, capsule
    assert alive() is not None
    del view
    assert alive() is None


# --- the collector, which may come at any allocation ---------------------------------------------

GPU = torch.device("cuda", 0)


class Cycle:
    """Garbage that only the collector finds, with a loan in it."""

    def __init__(self, memory):
        self.me, self.loan = self, _Loan(memory, GPU)


class CollectingEvent:
    """An event of a device that is done at once; each use of it runs the collector."""

    num_recorded = 0

    def __init__(self):
        gc.collect()

    def record(self, stream):
        gc.collect()
        self.num_recorded += 1

    def synchronize(self):
        self.num_waited = self.num_recorded

    def query(self):
        gc.collect()
        return self.num_waited == self.num_recorded


class CollectingStream:
    """A stream whose hash, as that of torch's, allocates."""

    def __hash__(self):
        gc.collect()
        return 7

    def __eq__(self, other):
        return self is other


@pytest.fixture
def collecting(monkeypatch):
    stream = CollectingStream()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "Event", CollectingEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return stream


def ends(work):
    """Whether the work ends, in a thread that may hang."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


@pytest.mark.parametrize("what", ["used", "wait"])
def test_a_loan_that_the_collector_finds_meanwhile_harms_nobody(collecting, what):
    memory = UnifiedMemory(torch.zeros(100))
    memory.used(GPU, wrote=False)
    Cycle(memory)
    if what == "used":
        assert ends(lambda: memory.used(GPU, wrote=True))
    else:
        assert ends(lambda: memory.wait(to_write=True))


def test_what_is_recorded_while_an_event_is_dropped_is_waited_for(collecting, monkeypatch):
    """The collector comes when the event is known to be done, and before it is gone."""
    memory = UnifiedMemory(torch.zeros(100))
    memory.used(GPU, wrote=False)
    query, found = CollectingEvent.query, []

    def query_and_leave_garbage(event):
        done = query(event)
        if not found:
            Cycle(memory)
            found.append(done)
        return done

    monkeypatch.setattr(CollectingEvent, "query", query_and_leave_garbage)
    assert ends(lambda: memory.wait(to_write=True))
    gc.collect()
    assert found == [True]
    (event,) = memory._read.values()
    assert event.num_recorded > getattr(event, "num_waited", 0)
