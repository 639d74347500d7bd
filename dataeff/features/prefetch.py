"""Rows on their way while the caller computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Prefetch:
    """A gather under way; `wait()` gives its rows.

    On the CPU it runs in the table's thread, on CUDA on the table's own stream.
    """

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish
        self._rows: Tensor | None = None

    def wait(self) -> Tensor:
        """Returns the rows, [*index.shape, *row shape], on the index's device.

        On CUDA the caller's current stream waits and the host does not. A second call returns the
        same tensor.

        Raises:
            IndexError: an index was out of range.
            RuntimeError: the table was closed before the gather began.
        """
        if self._rows is None:
            self._rows = self._finish()
        return self._rows


def prefetch_in_thread(executor: ThreadPoolExecutor, gather: Callable[[], Tensor]) -> Prefetch:
    """Runs `gather` in a thread; exceptions come out of `wait()`."""
    future: Future[Tensor] = executor.submit(gather)

    def finish() -> Tensor:
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError("the table was closed before this prefetch began") from None

    return Prefetch(finish)


def prefetch_on_stream(
    stream: torch.cuda.Stream, index: Tensor, gather: Callable[[], Tensor]
) -> Prefetch:
    """Runs `gather` on `stream`, after what the current stream has queued (it may make the index).

    The rows are allocated on `stream`; whoever waits lets their own stream wait for the event, and
    the side stream in turn waits for the current stream at the next prefetch, so a block that is
    freed and taken again is never written while it is still read.
    """
    stream.wait_stream(torch.cuda.current_stream(index.device))
    with torch.cuda.stream(stream):
        rows = gather()
        done = torch.cuda.Event()
        done.record(stream)

    def finish() -> Tensor:
        # The index lives in this closure until the gather has been ordered before its reader.
        torch.cuda.current_stream(index.device).wait_event(done)
        return rows

    return Prefetch(finish)
