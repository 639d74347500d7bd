"""The memory under unified tensors: registered once, aliased on each GPU, ordered with the CPU."""

from __future__ import annotations

import os
import sys
import threading
import weakref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.dlpack import from_dlpack

from dataeff import _core
from dataeff._ops import NO_REPLAY, library
from dataeff.features.registration import RegisteredMemory
from dataeff.memory.cuda import capturing

DLPACK_CPU, DLPACK_CUDA = 1, 2


def byte_span(x: Tensor) -> tuple[int, int]:
    """The first byte of a CPU tensor within its storage, and the bytes to its last."""
    if not x.numel():
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return int(x.storage_offset()) * x.element_size(), int(last + 1) * x.element_size()


class UnifiedMemory:
    """The bytes of a tensor and of all views of it.

    Args:
        x: a plain CPU tensor.
    """

    def __init__(self, x: Tensor) -> None:
        offset, nbytes = byte_span(x)
        flat = torch.empty(0, dtype=torch.uint8, device="cpu")
        if nbytes:
            flat.set_(x.untyped_storage(), offset, (nbytes,), (1,))
        self.registered = RegisteredMemory(flat)
        self.begin, self.end = flat.data_ptr(), flat.data_ptr() + nbytes
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._read: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._written: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        # Where a captured graph uses it, and whether one writes: nobody tells of its replays.
        self._captured: dict[torch.device, bool] = {}
        # No event may go that another thread has just recorded. Taken again by the thread that has
        # it, where the collector falls into its allocations and lets a loan go.
        self._lock = threading.RLock()
        self._lent: weakref.WeakKeyDictionary[_Loan, Tensor] = weakref.WeakKeyDictionary()

    def covers(self, x: Tensor) -> bool:
        """Whether a CPU tensor lies in it."""
        begin = x.data_ptr()
        return not x.numel() or self.begin <= begin <= begin + byte_span(x)[1] <= self.end

    def alias(self, x: Tensor, device: torch.device) -> Tensor:
        """The same elements as a tensor of `device`, reading and writing the host memory in place.

        Raises:
            RuntimeError: CUDA cannot register the memory; says why and what helps.
            ValueError: a device that reads no host memory.
        """
        if device.type == "meta" or not x.numel():
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        if device.type != "cuda":
            raise ValueError(f"unified memory is read by the CPU and by CUDA, not by {device}")
        self.registered.register(device)
        loan = _Loan(self, device)
        alias = byte_alias(x, DLPACK_CUDA, device.index, loan)
        self._lent[loan] = _version_of(alias)
        return alias

    # --- the order of what GPU and CPU do ---------------------------------------------------------

    def used(self, device: torch.device, wrote: bool) -> None:
        """Marks what the device's current stream has been given to do with the memory."""
        if device.type != "cuda":
            return
        if torch.cuda.is_current_stream_capturing():
            self._captured[device] = wrote or self._captured.get(device, False)
            return
        stream = torch.cuda.current_stream(device)
        events = self._written if wrote else self._read
        with self._lock:
            if stream not in events:
                events[stream] = torch.cuda.Event()
            events[stream].record(stream)

    def wait(self, to_write: bool) -> None:
        """Waits until the CPU may read, or write, what the GPUs have been given to do.

        What an alias that autograd keeps is read by is unknown before it goes: then a write waits
        for all that its device does. So does what a captured graph may be in the way of.
        """
        if self._pid != os.getpid():  # the parent's events, which a forked child may not ask
            self._parents = self._read, self._written, self._lent  # nor let go
            self._begin()
        busy = {loan.device for loan in list(self._lent)} if to_write else set()
        if not capturing():  # nothing is replayed meanwhile
            busy |= {device for device, wrote in self._captured.items() if to_write or wrote}
        for device in busy:
            torch.cuda.synchronize(device)
        for events in (self._written, self._read) if to_write else (self._written,):
            with self._lock:
                recorded = [(stream, events[stream]) for stream in list(events)]
            for stream, event in recorded:
                event.synchronize()
                with self._lock:  # kept where it has been recorded anew meanwhile
                    last = events.pop(stream, None)
                    if last is not None and not last.query():
                        events.setdefault(stream, last)

    def overwritten(self) -> None:
        """Lets autograd refuse to use what it has saved of the memory, as of any tensor."""
        for version in list(self._lent.values()):
            if not version.is_inference():  # which autograd does not save
                increment_version(version)


def _version_of(alias: Tensor) -> Tensor:
    """A tensor without memory that counts writes together with the alias and its views."""
    with torch.inference_mode(False):
        version = alias.detach()
        version.data = torch.empty(0, dtype=alias.dtype, device=alias.device)
    return version


class _Loan:
    """What the memory of an alias holds while a tensor uses it.

    Autograd lets it go when backward has queued what reads it, on the stream that does.
    """

    def __init__(self, memory: UnifiedMemory, device: torch.device) -> None:
        self._memory, self.device = memory, device

    def __del__(self) -> None:
        if not sys.is_finalizing() and self._memory._pid == os.getpid():
            self._memory.used(self.device, wrote=False)


def byte_alias(x: Tensor, device_type: int, device_id: int, owner: object) -> Tensor:
    """`x`'s elements as a tensor of a DLPack device, keeping `owner` alive."""
    nbytes = byte_span(x)[1]
    capsule = _core.alias_capsule(x.data_ptr(), nbytes, device_type, device_id, owner)
    flat: Tensor = from_dlpack(capsule)
    alias = flat.view(x.dtype).as_strided(x.shape, x.stride())
    # A view that stands for other values than its memory holds: u.conj(), u.conj().imag
    alias = alias.conj() if x.is_conj() else alias
    return torch._neg_view(alias) if x.is_neg() else alias


# --- in compiled functions: an operator over memory that is registered already -------------------

library.define("unified_alias(Tensor x, Tensor like) -> Tensor", tags=NO_REPLAY)


def _alias_cuda(x: Tensor, like: Tensor) -> Tensor:
    if not _core.is_registered(x.data_ptr(), byte_span(x)[1]):
        raise RuntimeError(
            "the memory is not registered with CUDA: call u.register() before the compiled function"
        )
    return byte_alias(x, DLPACK_CUDA, like.device.index, x.untyped_storage())


def _alias_fake(x: Tensor, like: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=like.device)


library.impl("unified_alias", _alias_cuda, "CUDA")
torch.library.register_fake("dataeff::unified_alias", _alias_fake, lib=library)
