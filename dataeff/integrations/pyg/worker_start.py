"""`worker_init_fn` of a loader whose workers are threads of one process."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils import worker as torch_worker

_in_turn = threading.Lock()


class WorkerStart:
    """Calls `worker_init_fn` as torch's workers do, in one thread after another.

    What `torch.utils.data.get_worker_info()` says is a variable of the process, so it is true of
    the thread for the time of the call alone; and so are the random generators (torch's, NumPy's
    and Python's), which are put back afterwards: a seed for each worker would be one for the
    caller, too, and the last to come would win.

    Args:
        worker_init_fn: called with the worker's number.
        num_workers: how many there are.
        seed: that of worker 0, as `get_worker_info().seed` gives it.
        dataset: what the loader loads.
    """

    def __init__(
        self, worker_init_fn: Callable[[int], object], num_workers: int, seed: int, dataset: Any
    ) -> None:
        self._call, self._num_workers = worker_init_fn, num_workers
        self._seed, self._dataset = seed, dataset

    def __call__(self, number: int) -> None:
        """Starts the worker of that number, in its thread."""
        info = torch_worker.WorkerInfo(
            id=number,
            num_workers=self._num_workers,
            seed=self._seed + number,
            dataset=self._dataset,
        )
        with _in_turn, _generators_kept(), _told(info):
            self._call(number)


@contextmanager
def _told(info: torch_worker.WorkerInfo) -> Iterator[None]:
    before = torch_worker._worker_info
    torch_worker._worker_info = info
    try:
        yield
    finally:
        torch_worker._worker_info = before


@contextmanager
def _generators_kept() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
