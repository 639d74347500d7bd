"""A table's memory, registered with CUDA in place so that kernels read it where it is."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dataeff import _core
from dataeff._ops import row_span
from dataeff.features.gather_cuda import bad_indices
from dataeff.memory.cuda import capturing, capturing_anywhere, current_device, refuse_in_capture
from dataeff.memory.own_pages import move_to_own_pages

# Devices, registration and storage of memory that was collected while a CUDA graph was captured,
# with the process: a wait for a device, or a release of its pages, would end the capture.
_put_off: list[
    tuple[int, set[torch.device], _core.HostRegistration | None, torch.UntypedStorage | None]
] = []


class RegisteredMemory:
    """Registers the memory under a tensor at its first use on CUDA, and holds both.

    The registration is released only after the devices that read it have finished: pages that go
    while a kernel reads them cost the whole CUDA context. So whoever launches a kernel that reads
    the memory does it in `with memory.readable(device)`, which a release in another thread awaits.

    Args:
        x: host memory; where CUDA is there, and it is small, it moves to pages of its own.
        in_place: leave it where it is: others hold its address.
    """

    def __init__(self, x: Tensor, in_place: bool = False) -> None:
        self.x = x
        if not in_place and torch.cuda.is_available():
            move_to_own_pages(x)
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._devices: set[torch.device] = set()
        self._registration: _core.HostRegistration | None = None
        self._span: tuple[int, int] | None = None
        # The tensor may be given other memory meanwhile; this must not be freed while registered,
        # or the next tensor at its address would be taken for registered too.
        self._storage: torch.UntypedStorage | None = None
        self._writable: tuple[int, int] | None = None  # a span that has been looked at

    @contextmanager
    def readable(self, device: torch.device) -> Iterator[None]:
        """Registers the memory, and keeps it so while its block queues work that reads it.

        Raises:
            RuntimeError: as `register`.
        """
        self._forget_if_forked()
        with self._lock:
            self.register(device)
            yield

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Waits for the devices that may be reading the memory; none begins during its block.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self._forget_if_forked()
        with self._lock:
            if self._devices:
                refuse_in_capture("the gathers under way", "write, share or close after it")
            for device in self._devices:
                torch.cuda.synchronize(device)
            yield

    @contextmanager
    def written(self) -> Iterator[None]:
        """As `unread`, for a block that writes into the memory.

        Raises:
            ValueError: it is mapped read-only, and a write would end the process.
        """
        span = row_span(self.x)
        if span != self._writable:
            if span[1] and mapped_read_only(span[0]):
                raise ValueError(
                    "the memory is mapped read-only: give the table a copy (x.clone()), or map the "
                    "file copy-on-write (numpy: mmap_mode='c')"
                )
            self._writable = span
        with self.unread():
            yield

    def register(self, device: torch.device) -> None:
        """Sees to it that kernels of `device` can read the memory.

        Raises:
            RuntimeError: CUDA refuses, or is not there, or a CUDA graph is being captured; says why
                and what helps.
        """
        if torch.cuda._is_in_bad_fork():
            raise RuntimeError(
                "this process was forked after CUDA was initialised, so host memory is read by the "
                "CPU alone here: index with a CPU tensor, or start the process with 'spawn'"
            )
        self._forget_if_forked()
        with self._lock:
            span = row_span(self.x)
            if span == self._span and device in self._devices:
                return
            if capturing():
                raise RuntimeError(
                    "host memory would be registered with CUDA while a CUDA graph is captured: "
                    "gather once, or call register(), before the capture"
                )
            _release_put_off()
            if span != self._span:  # sharing a tensor with another process moves its storage
                self.release()
                with torch.cuda.device(device):
                    self._registration = _core.HostRegistration(*span)
                self._span, self._storage = span, self.x.untyped_storage()
            if device not in self._devices:
                bad_indices(device)  # made now: a captured CUDA graph may allocate no pinned memory
                self._devices.add(device)

    def _forget_if_forked(self) -> None:
        if self._pid != os.getpid():  # devices, registration and whoever has the lock: the parent's
            self._begin()

    def release(self) -> None:
        """Waits for the devices that may be reading the memory and gives the registration back."""
        if _put_off:
            _release_put_off()
        with self.unread():
            if self._registration is not None:
                _close(self._registration, self._devices)
            self._devices.clear()
            self._registration = self._span = self._storage = None

    def __del__(self) -> None:
        # A compiler's trace makes one without its attributes.
        if sys.is_finalizing() or "_pid" not in self.__dict__:
            return
        here = self._pid == os.getpid()
        if here and self._devices and capturing_anywhere(self._devices):
            _put_off.append((self._pid, self._devices, self._registration, self._storage))
        else:
            self.release()


def _release_put_off() -> None:
    """Releases what was collected during a capture, if it has ended."""
    waiting = [entry for entry in _put_off if entry[0] == os.getpid()]  # others are the parent's
    if capturing_anywhere({device for _, devices, *_ in waiting for device in devices}):
        return
    while _put_off:
        pid, devices, registration, _storage = _put_off.pop()
        if pid != os.getpid():
            continue
        for device in devices:
            torch.cuda.synchronize(device)
        if registration is not None:
            _close(registration, devices)


def _close(registration: _core.HostRegistration, devices: set[torch.device]) -> None:
    """Gives it back from a device that has a context: another's would be started for it."""
    with current_device(next(iter(devices), torch.device("cpu"))):
        registration.close()


def mapped_read_only(address: int) -> bool:
    """Whether this process may read, but not write, what is at an address."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return False
    for line in maps.splitlines():
        bounds, rights = line.split(maxsplit=2)[:2]
        begin, end = (int(bound, 16) for bound in bounds.split("-"))
        if begin <= address < end:
            return "w" not in rights
    return False
