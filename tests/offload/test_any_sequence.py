"""Saving, asking, changing, forgetting and failing disks, in any sequence: the bits are right."""

import errno
import gc
import tempfile
import warnings

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.storage import FaultPlan

ERRORS = [errno.EIO, errno.ENOSPC, errno.EDQUOT]


class Saved:
    """What autograd would keep, and what it must get back.

    Attributes:
        handle: what `pack` returned.
        bits: a copy of the tensor as it was.
        layout: dtype, size and stride of it.
        counter: tells when it is changed.
    """

    def __init__(self, handle, tensor):
        self.handle, self.bits, self.version = handle, tensor.detach().clone(), tensor._version
        self.layout = tensor.dtype, tensor.size(), tensor.stride()
        self.counter = tensor.detach()  # shares the version, and the memory until `forget`
        self.counter.data = torch.empty(0)


HAS_TENSORS = precondition(lambda self: self.tensors)
HAS_SAVED = precondition(lambda self: self.saved)
WHICH = st.integers(0, 9)


class AnySequence(RuleBasedStateMachine):
    """What is in `tensors` the user holds, what is in `saved` a graph does."""

    def __init__(self):
        super().__init__()
        self.tensors, self.saved = [], []

    @initialize(
        engine=st.sampled_from(["threads", "io_uring"]),
        num_directories=st.integers(1, 2),
        checksum=st.booleans(),
        budget=st.sampled_from([None, 0, 1 << 16, 1 << 30]),
        spill_bytes=st.sampled_from([None, 1 << 17]),
        host=st.sampled_from([None, 0, 1 << 17]),
    )
    def open(self, engine, num_directories, checksum, budget, spill_bytes, host):
        self.folders = [tempfile.TemporaryDirectory() for _ in range(num_directories)]
        self.faults = FaultPlan()
        self.streams = None if host is None else self.late_streams(None, 1e-4)
        self.offload = ActivationOffload(
            nn.Linear(1, 1), [folder.name for folder in self.folders], min_bytes=0,
            engine=engine, checksum=checksum, in_flight_bytes=budget, prefetch_bytes=budget,
            spill_bytes=spill_bytes, faults=self.faults, host_bytes=host or 0,
            staging_bytes=1 << 17, streams_of=lambda device: self.streams,
        )  # fmt: skip
        self.cache = self.offload._cache
        self.num_made = 0

    def quietly(self, work, *args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return work(*args)

    @rule(num_rows=st.integers(1, 40), dtype=st.sampled_from(["f", "d", "h"]))
    def make(self, num_rows, dtype):
        self.num_made += 1
        start = torch.arange(num_rows * 512) + 31 * self.num_made
        kind = {"f": torch.float32, "d": torch.float64, "h": torch.bfloat16}[dtype]
        self.tensors.append((start % 251).to(kind).view(num_rows, 512).requires_grad_() * 1)

    @HAS_TENSORS
    @rule(which=WHICH, way=st.sampled_from(["t", "part", "flat", "wide"]))
    def view(self, which, way):
        tensor = self.tensors[which % len(self.tensors)]
        ways = {
            "t": tensor.t, "part": lambda: tensor[::2, 3:], "flat": tensor.flatten,
            "wide": lambda: tensor[:1].expand(3, -1),
        }  # fmt: skip
        if tensor.dim() == 2:
            self.tensors.append(ways[way]())

    @HAS_TENSORS
    @rule(which=WHICH)
    def forget(self, which):
        self.tensors.pop(which % len(self.tensors))

    @HAS_TENSORS
    @rule(which=WHICH)
    def change(self, which):
        row = self.tensors[which % len(self.tensors)].select(0, 0)
        if 0 in row.stride():  # torch changes no tensor in place that lies over itself
            row = row[:1]
        with torch.no_grad():
            row.mul_(2)

    @HAS_TENSORS
    @rule(which=WHICH)
    def save(self, which):
        tensor = self.tensors[which % len(self.tensors)]
        self.saved.append(Saved(self.quietly(self.cache.pack, tensor), tensor))

    @HAS_TENSORS
    @rule(which=WHICH)
    def save_and_forget(self, which):
        self.save(which)
        self.forget(which)

    @HAS_SAVED
    @rule(which=WHICH)
    def free(self, which):
        self.saved.pop(which % len(self.saved))

    @HAS_SAVED
    @rule(which=WHICH)
    def ask(self, which):
        self.check(self.saved[which % len(self.saved)])

    @HAS_SAVED
    @rule(which=WHICH)
    def ask_and_free(self, which):
        self.ask(which)
        self.free(which)

    @HAS_SAVED
    @rule()
    def backward(self):
        while self.saved:
            self.check(self.saved[-1])
            self.saved.pop()

    def check(self, saved):
        changed = saved.counter._version != saved.version
        got = None
        while got is None:
            try:
                got = self.quietly(self.cache.unpack, saved.handle)
            except RuntimeError as error:
                assert changed and "inplace" in str(error)
                return
            except OSError as error:  # the disk recovers, and may be asked again
                assert error.errno in ERRORS and "offset" in str(error)
        assert not changed
        assert (got.dtype, got.size(), got.stride()) == saved.layout
        assert torch.equal(got, saved.bits)

    @rule(
        op=st.sampled_from(["read", "write"]),
        error=st.sampled_from(ERRORS),
        nth=st.integers(1, 4),
    )
    def fail_once(self, op, error, nth):
        self.faults.add(op, error=error, nth=nth, times=1)

    @rule(op=st.sampled_from(["read", "write"]), nth=st.integers(1, 3))
    def falter(self, op, nth):
        self.faults.add(op, error=errno.EAGAIN, nth=nth, times=2)
        self.faults.add(op, max_nbytes=512, delay_s=1e-3, nth=nth, times=2)

    @rule()
    def drain(self):
        self.quietly(self.cache.drain)

    @rule()
    def begin_backward(self):
        self.quietly(self.offload.expect_backward)

    @rule()
    def next_step(self):
        def step():
            with self.offload:
                pass

        self.quietly(step)

    @invariant()
    def books(self):
        if not hasattr(self, "cache"):
            return
        self.quietly(self.cache.poll)
        held = self.cache.held
        assert held._nbytes >= 0 and held.cached_nbytes >= 0 and held.last_nbytes >= 0
        assert self.cache._outgoing.nbytes >= 0

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        self.quietly(self.cache.drain)
        report = self.offload.report()
        assert report.bytes_packed == (
            report.bytes_deduplicated + report.bytes_kept + report.bytes_written
            + report.bytes_host + report.bytes_cancelled + report.bytes_failed
            + report.bytes_capped
        )  # fmt: skip
        self.saved.clear()
        gc.collect()
        self.quietly(self.cache.drain)
        assert self.offload.report().saved_bytes == 0
        spills = self.offload._tiers._spills
        assert sum(file.used_nbytes for file in spills.files) == 0
        assert self.cache._outgoing.nbytes == self.cache.held.cached_nbytes == 0
        self.offload.close()
        if self.streams is not None:
            assert self.streams.pinned == 0
            for queue in self.streams.queues.values():
                queue.shutdown()
        for folder in self.folders:
            folder.cleanup()


def test_any_sequence(late_streams):
    AnySequence.late_streams = type(late_streams)
    run_state_machine_as_test(
        AnySequence,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
