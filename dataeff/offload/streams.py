"""The few stream operations that moving bytes off a device needs, and their rules.

- The compute stream is looked up at each call, before a side stream is entered.
- A copy waits for what the compute stream had queued, and the memory it reads is kept by a
  reference until the compute stream has been told to wait for the copy. Then it may be freed:
  whoever gets the memory next is queued behind that wait. `record_stream` on the copy's stream
  is not used; it would keep blocks back for an unknown time and fragment the allocator.
- What was allocated on another stream than it is saved on goes back to that one, which waits for
  nobody: `share` tells the allocator of the stream that saves. Without offload the graph keeps it.
- The target of a copy to the device is allocated on the stream that was current when the bytes
  were saved, where backward uses them: freeing it is in that stream's order too, also when it was
  fetched early, from the backward of another stream.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from dataeff import _core
from dataeff.memory import HostBuffer
from dataeff.memory.cuda import current_device
from dataeff.memory.numa import node_of
from dataeff.offload.moments import DeviceClock, DeviceMoment, Moment, Span, span_of

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class Event(Protocol):
    """The end of a copy in a stream."""

    def query(self) -> bool:
        """Whether it has been reached."""

    def synchronize(self) -> None:
        """Makes the host wait for it."""

    def span(self) -> Span | None:
        """When the copy began and ended; None while it has not ended."""


class Streams(Protocol):
    """Copies between one device and host memory, beside its compute stream."""

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copies a device tensor to host memory once what is queued now has run."""

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copies host memory to a device tensor once what is queued now has run."""

    def mark(self) -> Event:
        """The end of what is queued now on the compute stream."""

    def share(self, memory: torch.Tensor) -> None:
        """Lets whoever gets `memory` next wait for the current stream, if it is another's."""

    def order_after(self, event: Event) -> None:
        """What the caller queues from now on runs after `event`; the host does not wait."""

    def reuse_after(self, event: Event) -> None:
        """What is copied out from now on is copied after `event`; the host does not wait."""

    def beside(self, event: Event) -> AbstractContextManager[object]:
        """In the block, the stream that was current when `event` was made is current again."""

    def moment(self) -> Moment:
        """When the caller's stream has run what is queued on it now."""

    def pin(self, buffer: HostBuffer) -> None:
        """Makes host memory fit for asynchronous copies. Raises RuntimeError if it cannot be."""

    def unpin(self, buffer: HostBuffer) -> None:
        """Undoes `pin`."""


@dataclass(frozen=True)
class Arrival:
    """The end of the copy that brings bytes to a device, for whichever stream uses them."""

    streams: Streams
    event: Event

    def done(self) -> bool:
        """Whether the bytes are there, for every stream."""
        return self.event.query()

    def order(self) -> None:
        """Lets the current stream wait for the bytes."""
        self.streams.order_after(self.event)


@dataclass(frozen=True)
class CudaCopy:
    """A copy, or another piece of work, queued while `stream` was current; an `Event`."""

    begin: DeviceMoment
    end: DeviceMoment
    stream: torch.cuda.Stream

    def query(self) -> bool:
        """Whether it has ended."""
        return bool(self.end.event.query())

    def synchronize(self) -> None:
        """Makes the host wait for its end."""
        # The current device of a new thread is the first: CUDA may start a context there.
        with current_device(self.stream.device):
            self.end.event.synchronize()

    def span(self) -> Span | None:
        """When it began and ended, by the device's time stamps."""
        return span_of(self.begin, self.end)


class CudaStreams:
    """One side stream out of and one into a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)
        self._in = torch.cuda.Stream(device)
        self._registrations: dict[int, _core.HostRegistration] = {}

    @functools.cached_property
    def _clock(self) -> DeviceClock:
        # Not before something moves: it waits for the device, and to wait would end a capture.
        return DeviceClock(self._device)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> CudaCopy:
        """Copies on the outgoing stream."""
        return self._copy(self._out, source, target)

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> CudaCopy:
        """Copies on the incoming stream."""
        return self._copy(self._in, source, target)

    def mark(self) -> CudaCopy:
        """An event at the end of the current stream."""
        current, now = torch.cuda.current_stream(self._device), self.moment()
        return CudaCopy(now, now, current)

    def share(self, memory: torch.Tensor) -> None:
        """Notes the current stream as a user; of its own memory the allocator notes nothing."""
        memory.record_stream(torch.cuda.current_stream(self._device))

    def order_after(self, event: Event) -> None:
        """Lets the current stream wait for a copy, and the stream that it was queued beside.

        The device memory of the copy belongs to the latter: whoever gets it next runs there.
        """
        assert isinstance(event, CudaCopy)
        for stream in {torch.cuda.current_stream(self._device), event.stream}:
            stream.wait_event(event.end.event)

    def reuse_after(self, event: Event) -> None:
        """Lets the outgoing stream wait for a copy whose host memory is written next."""
        assert isinstance(event, CudaCopy)
        self._out.wait_event(event.end.event)

    def beside(self, event: Event) -> AbstractContextManager[object]:
        """In the block, allocations and copies belong to the stream of `event`."""
        assert isinstance(event, CudaCopy)
        return torch.cuda.stream(event.stream)

    def moment(self) -> DeviceMoment:
        """When the current stream gets here."""
        return self._clock.moment(torch.cuda.current_stream(self._device))

    def pin(self, buffer: HostBuffer) -> None:
        """Registers the buffer with CUDA, in place, in memory of the device's NUMA node."""
        nbytes = buffer.capacity_nbytes
        if (node := node_of(self._device)) is not None:
            _core.prefer_node(buffer.data_ptr, nbytes, node)
        if _core.cuda_built:
            with torch.cuda.device(self._device):
                registration = _core.HostRegistration(buffer.data_ptr, nbytes)
            self._registrations[buffer.data_ptr] = registration
            return
        code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr, nbytes, _PORTABLE)
        if int(code) != 0:
            raise RuntimeError(
                f"CUDA cannot pin {nbytes} bytes of host memory (error {code}): "
                "ask for fewer host_bytes, or raise the limit of locked memory (ulimit -l)"
            )

    def unpin(self, buffer: HostBuffer) -> None:
        """Takes the registration back, when no copy uses it any more."""
        self._out.synchronize()
        self._in.synchronize()
        registration = self._registrations.pop(buffer.data_ptr, None)
        if registration is None:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr)
        else:
            registration.close()

    def _copy(
        self, side: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor
    ) -> CudaCopy:
        current = torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            begin = self._clock.moment(side)
            target.copy_(source, non_blocking=True)
            end = self._clock.moment(side)
        return CudaCopy(begin, end, current)
