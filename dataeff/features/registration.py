"""A table's memory, registered with CUDA in place so that kernels read it where it is."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

from dataeff import _core
from dataeff._ops import row_span
from dataeff.features.gather_cuda import bad_indices


class RegisteredMemory:
    """Registers the memory under a tensor at its first use on CUDA, and holds both.

    The registration is released only after the devices that read it have finished: pages that go
    while a kernel reads them cost the whole CUDA context.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._devices: set[torch.device] = set()
        self._registration: _core.HostRegistration | None = None
        self._span: tuple[int, int] | None = None
        self._pid = os.getpid()

    def register(self, device: torch.device) -> None:
        """Sees to it that kernels of `device` can read the memory.

        Raises:
            RuntimeError: CUDA refuses, or is not there; says why and what helps.
        """
        if torch.cuda._is_in_bad_fork():
            raise RuntimeError(
                "this process was forked after CUDA was initialised, so host memory is read by the "
                "CPU alone here: index with a CPU tensor, or start the process with 'spawn'"
            )
        self._forget_if_forked()
        span = row_span(self.x)
        if span != self._span:  # sharing a tensor with another process moves its storage
            self.release()
            with torch.cuda.device(device):
                self._registration = _core.HostRegistration(*span)
            self._span = span
        if device not in self._devices:
            bad_indices(device)  # made now: a captured CUDA graph may allocate no pinned memory
            self._devices.add(device)

    def _forget_if_forked(self) -> None:
        if self._pid != os.getpid():  # the devices and the registration are the parent's
            self._devices.clear()
            self._registration = self._span = None
            self._pid = os.getpid()

    def synchronize(self) -> None:
        """Waits for the devices that may be reading the memory."""
        self._forget_if_forked()
        for device in self._devices:
            torch.cuda.synchronize(device)

    def release(self) -> None:
        """Waits for those devices and gives the registration back."""
        self._forget_if_forked()
        if self._registration is not None:
            self.synchronize()
            self._registration.close()
        self._devices.clear()
        self._registration = self._span = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.release()
