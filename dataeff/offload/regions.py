"""Compiled regions: the backward of each asks for everything that its forward saved, at once.

A region that saves most of a pass has most of it in memory at once when its backward begins,
whatever was moved out before. `torch.compile` of the model's blocks one by one makes many small
regions instead of a large one; `dataeff.offload.compile_backend` has a large one ask for each value
where it uses it.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from dataeff.offload.schedule import Tape

_NODE = "CompiledFunction"  # what torch._functorch calls its autograd function
_FRAME = "compile_wrapper"  # what dynamo calls the function that it gives for a compiled one

_thread = threading.local()


@contextmanager
def one_by_one() -> Iterator[None]:
    """What is asked for in this block, a region asks for where it uses it, not with all else."""
    _thread.one_by_one = True
    try:
        yield
    finally:
        _thread.one_by_one = False


def in_region() -> bool:
    """Whether something compiled runs on this thread."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    frame: FrameType | None = None if dynamo is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == _FRAME and frame.f_globals is vars(dynamo):
            return True
        frame = frame.f_back
    return False


class CompiledRegions:
    """Notices when a compiled region brings back more than half of a pass.

    Attributes:
        largest_nbytes: the most bytes that one region has asked for at once.
        pass_nbytes: the bytes that were moved in that pass.
        said: whether the user has been told.
    """

    def __init__(self) -> None:
        self.largest_nbytes = self.pass_nbytes = 0
        self.said = False
        self._tape: weakref.ref[Tape] | None = None
        self._node: tuple[int, int] | None = None
        self._positions: set[int] = set()
        self._nbytes = 0

    def see(self, tape: Tape, position: int, nbytes: int) -> None:
        """Backward asks for the storage of `nbytes` at `position` of `tape`."""
        if "torch._dynamo.eval_frame" not in sys.modules:  # nothing was compiled
            return
        if getattr(_thread, "one_by_one", False):
            return
        node = torch._C._current_autograd_node()
        if node is None or not node.name().startswith(_NODE):
            return
        key = (torch._C._current_graph_task_id(), node._sequence_nr())
        if key != self._node or self._tape is None or self._tape() is not tape:
            self._node, self._tape = key, weakref.ref(tape)
            self._positions, self._nbytes = set(), 0
        if position not in self._positions:
            self._positions.add(position)
            self._nbytes += nbytes
        if len(self._positions) > 1 and self._nbytes > self.largest_nbytes:
            self.largest_nbytes, self.pass_nbytes = self._nbytes, tape.nbytes

    def say(self, stacklevel: int) -> None:
        """Warns, once, when a region asked for more than half of a pass."""
        if self.said or 2 * self.largest_nbytes <= self.pass_nbytes:
            return
        self.said = True
        warnings.warn(
            f"activation offload: one compiled region asked for {self.largest_nbytes} of the "
            f"{self.pass_nbytes} bytes moved in a pass at once, so memory falls in forward only. "
            "Compile the blocks of the model one by one instead: each then asks for its own. Or "
            "compile the whole with backend=dataeff.offload.compile_backend.",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
