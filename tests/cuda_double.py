"""Streams and events that only write down what they are told: for the order in which work goes."""

import contextlib

import torch


class Event:
    def __init__(self, log):
        self.log, self.stream = log, None

    def record(self, stream):
        self.stream, self.reached = stream, False
        self.log.append(("record", stream.name))

    def query(self):
        return self.reached

    def synchronize(self):
        self.log.append(("host waits for event of", self.stream.name))
        self.reached = True


class Stream:
    def __init__(self, log, name):
        self.log, self.name, self.device = log, name, torch.device("cpu")

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for event of", event.stream.name))

    def record_event(self):
        event = Event(self.log)
        event.record(self)
        return event


class Cuda:
    """Stands in for the streams of `torch.cuda`.

    Attributes:
        log: what happened, in order.
        current: the current stream.
    """

    def __init__(self, monkeypatch):
        self.log = []
        self.current = self.stream("reader")
        monkeypatch.setattr(
            torch.cuda, "Stream", lambda device=None, priority=0: self.stream("side")
        )
        monkeypatch.setattr(torch.cuda, "Event", lambda external=False: Event(self.log))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def stream(self, name):
        return Stream(self.log, name)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before
