"""The few stream operations that moving bytes off a device needs, and their rules.

- The compute stream is looked up at each call, before a side stream is entered.
- A copy waits for what the compute stream had queued, and the memory it reads is kept by a
  reference until the compute stream has been told to wait for the copy. Then it may be freed:
  whoever gets the memory next is queued behind that wait. `record_stream` is not used; it would
  keep blocks back for an unknown time and fragment the allocator.
- The target of a copy to the device is allocated on the compute stream, so that freeing it is in
  that stream's order too.
"""

from __future__ import annotations

from typing import Protocol

import torch

from dataeff.memory import HostBuffer


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether it has been reached."""

    def synchronize(self) -> None:
        """Makes the host wait for it."""


class Streams(Protocol):
    """Copies between one device and host memory, beside its compute stream."""

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copies a device tensor to host memory once what is queued now has run."""

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copies host memory to a device tensor once what is queued now has run."""

    def order_after(self, event: Event) -> None:
        """What the caller queues from now on runs after `event`; the host does not wait."""

    def pin(self, buffer: HostBuffer) -> None:
        """Makes host memory fit for asynchronous copies. Raises RuntimeError if it cannot be."""

    def unpin(self, buffer: HostBuffer) -> None:
        """Undoes `pin`."""


class CudaStreams:
    """One side stream out of and one into a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)
        self._in = torch.cuda.Stream(device)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Copies on the outgoing stream."""
        return self._copy(self._out, source, target)

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Copies on the incoming stream."""
        return self._copy(self._in, source, target)

    def order_after(self, event: Event) -> None:
        """Lets the current stream wait for `event`."""
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(event)

    def pin(self, buffer: HostBuffer) -> None:
        """Registers the buffer with CUDA, in place."""
        code = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr, buffer.capacity_nbytes, 0)
        if int(code) != 0:
            raise RuntimeError(
                f"CUDA cannot pin {buffer.capacity_nbytes} bytes of host memory (error {code}): "
                "ask for fewer host_bytes, or raise the limit of locked memory (ulimit -l)"
            )

    def unpin(self, buffer: HostBuffer) -> None:
        """Takes the registration back, when no copy uses it any more."""
        self._out.synchronize()
        self._in.synchronize()
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr)

    def _copy(
        self, side: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor
    ) -> torch.cuda.Event:
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
            event: torch.cuda.Event = side.record_event()
        return event
