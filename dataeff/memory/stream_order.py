"""The order of streams around device memory that is made once and read by later calls."""

from __future__ import annotations

import sys
import threading

import torch

from dataeff.memory.cuda import captures


class StreamOrder:
    """Lets tensors that one stream has made be read on every other, and be let go on any.

    Who keeps such tensors calls `made` when a new one is queued, before others can find it, `read`
    when one is handed out, and `let_go` before they go, when nobody has one in hand. A caller on
    another stream cannot know that there is something to wait for.

    Args:
        device: where the tensors are; on a CPU there is no order to keep.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._lock = threading.Lock()
        self._made: dict[int, torch.cuda.Event] = {}  # the last of each stream, by its address
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._ordered: frozenset[int] = frozenset()  # streams that are behind all that is made

    @property
    def is_shared(self) -> bool:
        """Whether more than one stream has made or read something."""
        return len(self._streams) > 1

    def made(self) -> None:
        """Notes that the current stream has been given what makes a tensor."""
        if not self._on_gpu:
            return
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            here = stream.cuda_stream
            behind_others = here in self._ordered or not self._made.keys() - {here}
            event = torch.cuda.Event()
            event.record(stream)
            self._made[here] = event
            self._streams[here] = stream
            self._ordered = frozenset({here} if behind_others else ())

    def read(self) -> None:
        """Lets the current stream wait for what others have made, the host not.

        A capture waits for nothing: it begins when the device is done.
        """
        if not self._on_gpu:
            return
        here = torch._C._cuda_getCurrentRawStream(self._device.index)
        if here in self._ordered or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self._device)
        with self._lock:
            for there, event in self._made.items():
                if there != here:
                    stream.wait_event(event)
            self._streams[here] = stream
            self._ordered |= {here}

    def let_go(self) -> None:
        """Lets streams whose memory is about to go wait for those that have read it."""
        if not self.is_shared or sys.is_finalizing() or torch.cuda._is_in_bad_fork():
            return
        free = [stream for stream in self._streams.values() if not captures(stream)]
        for owner in free:
            if owner.cuda_stream not in self._made:
                continue
            for reader in free:
                if reader != owner:
                    owner.wait_stream(reader)
