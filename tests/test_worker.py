"""A thread in the background ends, whatever ends the program."""

import gc
import threading
import weakref

import pytest

from dataeff._worker import worker


def test_work_is_done_in_turn_on_one_thread():
    with worker("busy") as executor:
        done = [executor.submit(threading.get_ident) for _ in range(3)]
    assert len({future.result() for future in done} - {threading.get_ident()}) == 1


def test_an_interrupt_while_the_thread_starts_leaves_none_that_is_waited_for(monkeypatch):
    """The process hung at its end."""
    start, started = threading.Thread.start, []

    def interrupted(thread):
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker("late")
    started[0].join(timeout=10)
    assert not started[0].is_alive()


class Owner:
    """Waits for its worker when it is collected, as an offload does."""

    def __init__(self, done):
        self.executor, self.done = worker("owned", kept=True), done
        self.itself = self

    def __del__(self):
        self.done.append(self.executor.submit(int).result(timeout=10))
        self.executor.shutdown()


def test_a_worker_serves_who_collects_it():
    """The thread of garbage had ended before, and who waited for it waited for ever."""
    done = []
    owner = Owner(done)
    executor = weakref.ref(owner.executor)
    del owner
    gc.collect()
    assert done == [0]
    gc.collect()
    assert executor() is None
