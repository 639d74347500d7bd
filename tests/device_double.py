"""A device whose streams do work of a known length, and whose host sees how far it has come."""

import contextlib

import torch


class Stream:
    """A stream whose work is known by its length."""

    device = torch.device("cpu")

    def __init__(self):
        self.now_ms = 0.0

    def wait_stream(self, other):
        self.now_ms = max(self.now_ms, other.now_ms)

    def wait_event(self, event):
        self.now_ms = max(self.now_ms, event.at_ms)


class Slow:
    """A tensor that takes so long to copy."""

    def __init__(self, device, ms):
        self.device, self.ms = device, ms

    def copy_(self, source, non_blocking):
        assert non_blocking
        self.device.current.now_ms += self.ms


class Device:
    """Stands in for `torch.cuda`: what is queued ends at a time of its own.

    `reached_ms`: how far the device has come, for a host that asks.
    """

    def __init__(self, monkeypatch):
        self.compute = self.current = Stream()
        self.reached_ms = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing=False, blocking=False):
                self.timed, self.blocking, self.at_ms = enable_timing, blocking, None

            def record(self, stream):
                self.at_ms = stream.now_ms

            def query(self):
                return self.at_ms <= device.reached_ms

            def synchronize(self):
                assert self.blocking  # or the thread that waits keeps a processor busy
                device.reached_ms = max(device.reached_ms, self.at_ms)

            def elapsed_time(self, other):
                assert self.timed and other.timed and self.query() and other.query()
                return other.at_ms - self.at_ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before
