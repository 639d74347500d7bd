"""A device with a clock of its own, whose host runs ahead of it, as beside a GPU with much to do.

Compute and the copies out and in are three streams, each a timeline in virtual seconds. What the
host queues takes it next to no time, so that an event is hardly ever reached when it asks; its own
clock comes up with the device only when it waits. The bytes are copied at once, and each copy is
checked against those whose memory it uses again: it may not begin before they have ended.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass

import torch
from torch import nn

_TICK_S = 1e-6  # what the host takes for a call
_NS = 10**9


@dataclass
class Use:
    """A copy's use of some memory, from one virtual time to another."""

    first: int
    last: int
    writes: bool
    begin_s: float
    end_s: float

    def clashes(self, other: Use) -> bool:
        meet = self.first < other.last and other.first < self.last
        return meet and (self.writes or other.writes) and self.begin_s < other.end_s


@dataclass(frozen=True, eq=False)
class Reached:
    """The end of a piece of work on a stream."""

    device: VirtualDevice
    begin_s: float
    end_s: float

    def query(self):
        self.device.num_queries += 1
        return self.device.host_s >= self.end_s

    def synchronize(self):
        if self.device.host_s < self.end_s:
            self.device.num_waits += 1
            self.device.host_s = self.end_s

    def span(self):
        if self.device.host_s < self.end_s:
            return None
        return int(self.begin_s * _NS), int(self.end_s * _NS)

    def ns(self):
        return int(self.end_s * _NS) if self.device.host_s >= self.end_s else None


class VirtualDevice:
    """Compute that takes as long as it is told, and copies at `bandwidth` bytes a second each way.

    Is the streams of a device for `ActivationOffload(streams_of=lambda device: ...)`.

    Attributes:
        host_s: the time at which the host is.
        stalls: when compute stood still for a copy, and how long.
        loads: when each copy in began.
        num_queries: of events, by the host.
        num_waits: of the host, for the device.
    """

    def __init__(self, bandwidth):
        self.bandwidth = bandwidth
        self.host_s = self.compute_s = self.out_s = self.in_s = 0.0
        self.stalls, self.loads, self.uses = [], [], []
        self.num_queries = self.num_waits = 0

    def compute(self, seconds):
        """Queues so much work on the compute stream."""
        self._tick()
        self.compute_s += seconds

    def catch_up(self):
        """The host waits for the device."""
        self.host_s = max(self.host_s, self.compute_s, self.out_s, self.in_s)

    def stalled_s(self, since_s=0.0):
        """How long compute has stood still for copies since then."""
        return sum(seconds for at_s, seconds in self.stalls if at_s >= since_s)

    def copy_out(self, source, target):
        self.out_s, event = self._copy(self.out_s, source, target)
        return event

    def copy_in(self, source, target):
        self.in_s, event = self._copy(self.in_s, source, target)
        self.loads.append(event.begin_s)
        return event

    def mark(self):
        self._tick()
        return Reached(self, self.compute_s, self.compute_s)

    moment = mark

    def order_after(self, event):
        self._tick()
        if event.end_s > self.compute_s:
            self.stalls.append((self.compute_s, event.end_s - self.compute_s))
            self.compute_s = event.end_s

    def reuse_after(self, event):
        self._tick()
        self.out_s = max(self.out_s, event.end_s)

    def beside(self, event):
        return contextlib.nullcontext()

    def share(self, memory):
        pass

    pin = unpin = share

    def _tick(self):
        self.host_s += _TICK_S
        self.compute_s = max(self.compute_s, self.host_s)  # it has nothing to do before

    def _copy(self, stream_s, source, target):
        self._tick()
        begin_s = max(stream_s, self.compute_s)
        end_s = begin_s + source.nbytes / self.bandwidth
        self.uses = [use for use in self.uses if use.end_s > self.host_s]
        for tensor, writes in ((source, False), (target, True)):
            first = tensor.data_ptr()
            mine = Use(first, first + tensor.nbytes, writes, begin_s, end_s)
            assert not any(mine.clashes(use) for use in self.uses), "memory is used again too early"
            self.uses.append(mine)
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
        return end_s, Reached(self, begin_s, end_s)


class Work(torch.autograd.Function):
    """Takes a while each way, and saves its input."""

    @staticmethod
    def forward(ctx, x, device, seconds):
        device.compute(seconds)
        ctx.save_for_backward(x)
        ctx.device, ctx.seconds = device, seconds
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        ctx.device.compute(2 * ctx.seconds)
        return grad * x.cos(), None, None


class Chain(nn.Module):
    """Layers that each save as many bytes, and take so many seconds forward and twice back."""

    def __init__(self, device, num_layers, nbytes, seconds):
        super().__init__()
        self.device, self.num_layers, self.seconds = device, num_layers, seconds
        self.scale = nn.Parameter(torch.ones(nbytes // 4))

    def forward(self):
        x = self.scale * 1.0
        for _ in range(self.num_layers):
            x = Work.apply(x, self.device, self.seconds)
        return x.sum()
