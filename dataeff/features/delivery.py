"""What threads that work ahead do on a GPU: on their own stream, in order with the reader's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

Task = TypeVar("Task")
Result = TypeVar("Result")


class Delivery:
    """Runs work of other threads on one stream beside the stream of whoever takes the results.

    A thread begins on the default stream of the first GPU, whatever its starter has chosen: there
    the work would wait for the reader's kernels, or race with them. Memory of a result that the
    reader lets go comes round to this stream again: it first waits for what the reader has queued,
    and work under way at that moment, which is past this wait, does not get the memory before the
    reader's kernels are done (`record_stream`: no event of ours comes after all of them).

    Args:
        device: a CUDA device; without a number the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._reader = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(self._reader.device)

    def drawn(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """The tasks, for `run`: behind what the stream that is current where each is drawn does."""
        for task in tasks:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            yield task

    def run(self, work: Callable[[Task], Result], task: Task) -> tuple[Result, torch.cuda.Event]:
        """`work(task)` on the stream, and the event after it; in any thread."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(self._reader)
            _each_tensor(task, partial(_stays_for, self._stream))
            result = work(task)
            done: torch.cuda.Event = self._stream.record_event()
        return result, done

    def take(self, delivered: tuple[Result, torch.cuda.Event]) -> Result:
        """The result, for kernels that the reader's current stream is given from now on."""
        result, done = delivered
        self._reader = torch.cuda.current_stream(self._stream.device)
        self._reader.wait_event(done)
        _each_tensor(result, partial(_stays_for, self._reader))
        return result


def _stays_for(stream: torch.cuda.Stream, tensor: Any) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
        tensor.record_stream(stream)


def _each_tensor(result: Any, visit: Callable[[Any], None]) -> None:
    """`visit` for the tensors of a sample, of a batch of PyG's, or of any tree of such."""
    for part in tree_leaves(result):
        if isinstance(part, torch.Tensor):
            visit(part)
        elif hasattr(part, "apply_"):
            part.apply_(visit)  # Data, HeteroData
        elif is_dataclass(part) or isinstance(part, SimpleNamespace):
            _each_tensor(vars(part), visit)
