"""`ActivationOffload`: the context manager around a training step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from dataeff.ledger import Ledger
from dataeff.offload.cache import Budgets, TensorCache
from dataeff.offload.disk import SMALLEST_NBYTES, DiskCopy, SpillSet
from dataeff.offload.exclude import Exclusions
from dataeff.offload.policy import Policy, Selection, resolve_policy
from dataeff.offload.report import OffloadReport, make_report
from dataeff.storage import FaultPlan, open_engine

_MAX_SPANS = 100_000


class ActivationOffload:
    """Moves what autograd saves for backward out of memory, and gives back the same bits.

    ```python
    offload = dataeff.ActivationOffload(model, spill=["/nvme0"])
    for batch in loader:
        with offload:
            loss = model(batch)
            loss.backward()
    print(offload.report())
    ```
    Saved tensors are written to disk while forward runs and dropped from memory when they are
    there; they are read back in the order in which backward is expected to ask. One storage is
    written once, however many tensors are views of it; parameters, buffers, their views and casts,
    and the inputs of `model` are left alone. Gradients are bit-identical to those without it.

    The object is used for a whole training run. Backward may also run after the `with` block.

    Args:
        model: the module that is trained.
        spill: directories on the disks to use; each gets one file, which is unlinked at once.
        policy: `"all"`, or a callable that is asked about each storage
            (`SavedTensorInfo -> bool`); tensors it declines stay in memory.
        min_bytes: storages smaller than this stay in memory (and those under 16 KiB always).
        checksum: keep a CRC-32C of what is written and check it when it is read.
        in_flight_bytes: the most that may wait in memory for its write to end; beyond it, forward
            waits. Chosen when None: an eighth of what a pass saves, at least two of its storages.
        prefetch_bytes: the most that may be brought back ahead of backward; chosen alike.
        spill_bytes: the most that each spill file may take; the disk's limit when None.
        num_threads: threads that read and write.
        faults: a plan of I/O faults, for tests.

    Raises:
        ValueError: `spill` is empty, or `policy` is not known.
        OSError: a directory cannot be written to.

    SSDTrain (arXiv 2408.10013) describes the method.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spill: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        *,
        policy: str | Policy = "all",
        min_bytes: int = 1 << 20,
        checksum: bool = False,
        in_flight_bytes: int | None = None,
        prefetch_bytes: int | None = None,
        spill_bytes: int | None = None,
        num_threads: int = 4,
        faults: FaultPlan | None = None,
    ) -> None:
        self._model = model
        self._exclusions = Exclusions(model)
        self._selection = Selection(
            resolve_policy(policy), max(min_bytes, SMALLEST_NBYTES), self._exclusions
        )
        self.ledger = Ledger(max_spans=_MAX_SPANS)
        directories = [spill] if isinstance(spill, (str, os.PathLike)) else list(spill)
        engine = open_engine("threads", num_threads=num_threads, faults=faults)
        spills = SpillSet(directories, engine, spill_bytes)
        self._cache = TensorCache(
            partial(DiskCopy, spills, checksum=checksum),
            self._selection,
            self._exclusions,
            Budgets(in_flight_bytes, prefetch_bytes),
            self.ledger,
            on_close=spills.close,
        )
        self._hooks: saved_tensors_hooks | None = None
        self._input_hook: Any = None

    def __enter__(self) -> ActivationOffload:
        if self._hooks is not None:
            raise RuntimeError("this ActivationOffload is already active: it cannot be nested")
        if self._cache.closed:
            raise RuntimeError("this ActivationOffload is closed")
        self._exclusions.refresh()
        self._input_hook = self._model.register_forward_pre_hook(
            lambda module, args, kwargs: self._exclusions.set_inputs(args, kwargs),
            with_kwargs=True,
        )
        self._hooks = saved_tensors_hooks(self._cache.pack, self._cache.unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        hooks, self._hooks = self._hooks, None
        assert hooks is not None
        hooks.__exit__(kind, error, traceback)
        self._input_hook.remove()
        self._cache.poll()

    def report(self) -> OffloadReport:
        """What was saved, where it went and what it cost, since the object was made."""
        self._cache.poll()
        return make_report(self._cache.counters, self._cache.held_nbytes, self._selection.min_bytes)

    def trace(self, path: str | Path) -> None:
        """Writes stores, loads and waits as a Chrome trace (`chrome://tracing`, Perfetto)."""
        self.ledger.chrome_trace(path)

    def close(self) -> None:
        """Ends all transfers and gives the files back. Closing twice is harmless.

        What is only on disk can not be unpacked afterwards: close after the last backward.
        """
        self._cache.close()
