"""Operators with which a compiled graph gives a value away and has it back.

    ticket = torch.ops.dataeff.leave(x)  # 8 bytes, [8], uint8, on the CPU
    x = torch.ops.dataeff.come_back(ticket, x.size(), x.stride(), x.dtype, x.device)

What `leave` is given is packed by the offload that is active on this thread, or held as it is where
none is. It lives as long as the ticket's memory does, whoever holds that: autograd, as a rule.
"""

from __future__ import annotations

import ctypes
import itertools
import weakref
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from dataeff import _core
from dataeff._ops import NO_REPLAY, library
from dataeff.memory.scratch import CPU_DEVICE
from dataeff.offload.hook_stack import in_force
from dataeff.offload.regions import one_by_one

_NBYTES = 8
_ALIGNMENT = 16  # bytes, of which Inductor takes what an operator returns to begin at a multiple
_numbers = itertools.count(1)  # which threads draw from without a lock

library.define("leave(Tensor x) -> Tensor", tags=(*NO_REPLAY, torch.Tag.needs_exact_strides))
library.define(
    "come_back(Tensor ticket, SymInt[] size, SymInt[] stride, ScalarType dtype, Device device)"
    " -> Tensor",
    tags=NO_REPLAY,
)


class _Left:
    """A value that was given away; its memory is that of the ticket.

    Attributes:
        number: by which the ticket names it.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._hooks = in_force()
        x = _aligned(x)
        # An alias: with autograd away, as it is in a graph, others of `x` do not share its version.
        self._packed = x if self._hooks is None else self._hooks.pack(x.detach())
        self.number = ctypes.c_int64(next(_numbers))

    def back(self) -> torch.Tensor:
        """The value, as often as it is asked for."""
        if self._hooks is None:
            held: torch.Tensor = self._packed
            return held
        with one_by_one():
            back: torch.Tensor = self._hooks.unpack(self._packed)
        return back


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or where it begins within a row of another value, a copy with the same gaps."""
    if x.data_ptr() % _ALIGNMENT == 0:
        return x
    reach = 1 + sum((n - 1) * step for n, step in zip(x.size(), x.stride(), strict=True))
    return x.as_strided((reach,), (1,)).clone().as_strided(x.size(), x.stride(), 0)


_left: weakref.WeakValueDictionary[int, _Left] = weakref.WeakValueDictionary()


def blank() -> torch.Tensor:
    """A tensor like a ticket."""
    return torch.empty(_NBYTES, dtype=torch.uint8, device="cpu")


def _leave(x: torch.Tensor) -> torch.Tensor:
    left = _Left(x)
    _left[left.number.value] = left
    place = ctypes.addressof(left.number)
    ticket: torch.Tensor = from_dlpack(_core.alias_capsule(place, _NBYTES, CPU_DEVICE, 0, left))
    return ticket


def _come_back(ticket: torch.Tensor, *layout: Any) -> torch.Tensor:
    left = _left.get(ctypes.c_int64.from_address(ticket.data_ptr()).value)
    if left is None:
        raise RuntimeError(
            "a value that a compiled graph has given away is lost: other hooks on saved tensors "
            "copied its ticket. Run what compile_backend has compiled under an ActivationOffload, "
            "or under no hooks"
        )
    return left.back()


def _come_back_fake(
    ticket: torch.Tensor, size: Any, stride: Any, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


library.impl("leave", _leave, "CompositeExplicitAutograd")
library.impl("come_back", _come_back, "CompositeExplicitAutograd")
torch.library.register_fake("dataeff::leave", lambda x: blank(), lib=library)
torch.library.register_fake("dataeff::come_back", _come_back_fake, lib=library)
