"""`ActivationOffload`: the context manager around a training step."""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch

from dataeff._flags import checked_bool
from dataeff._integers import checked_int
from dataeff._reals import checked_real
from dataeff.ledger import Ledger
from dataeff.memory.cuda import capturing
from dataeff.offload.auto import AutoPolicy
from dataeff.offload.cache import CAPTURED, TensorCache
from dataeff.offload.disk import SMALLEST_NBYTES
from dataeff.offload.exclude import Exclusions
from dataeff.offload.hook_stack import HookStack
from dataeff.offload.live import LiveView
from dataeff.offload.opening import check_model, device_of, open_tiers
from dataeff.offload.passes import Budgets, in_backward
from dataeff.offload.places import spill_directories
from dataeff.offload.planner import Plan
from dataeff.offload.policy import Policy, Selection, resolve_policy
from dataeff.offload.report import OffloadReport, Pace, make_report
from dataeff.offload.rest import Asked, Rest
from dataeff.offload.scopes import Scopes
from dataeff.offload.simulate import Forecast
from dataeff.offload.tiers import StreamsOf, cuda_streams
from dataeff.offload.wear import Endurance, StepClock, Wear
from dataeff.storage import FaultPlan

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
    the inputs of `model` and small slices of data are left alone, and from the second step on the
    last storages, which backward wants at once (half of what may be in flight). Gradients are
    bit-identical to those without it.

    The object is used for a whole training run; `close()`, or its end, takes its hooks off the
    model and gives the files back. Backward may also run after the `with` block.

    When two steps had nothing to move, those that follow are not looked at, and cost nothing, while
    the model is called with tensors of the sizes that those steps had and as many of its parameters
    are frozen; every 64th is. A callable `policy` may change its mind from step to step: when the
    model is called it is asked again about what such a call saved the last time, and where it would
    move any of that, the call is looked at.

    `torch.func.grad` and its kin refuse to run where saved tensors are hooked: call them outside.

    With `torch.compile`, compile the blocks of the model one by one: the backward of a compiled
    region asks for everything that region saved at once, which is warned of. Or compile the whole
    with `torch.compile(model, backend=dataeff.offload.compile_backend)`.

    Args:
        model: the module that is trained.
        spill: directories on the disks to use; each gets one file, which is unlinked at once.
            `{rank}` and `{local_rank}` in a name are filled in as torchrun set them, and such a
            directory is made: `spill="/nvme{local_rank}"`. `~` and variables stand for what they do
            in a shell.
        host_bytes: size of the host tier: pinned memory that a GPU's tensors go to first; when it
            is full they go to disk. Tensors in host memory go to disk only.
        policy: `"all"`; or `"auto"`: steps 3 to 17 (with their backward in the block) are measured,
            and a plan made for each block of the model: keep, host, disk or recompute, whichever
            costs least within `memory_budget`; or names of modules, whose tensors (and their
            submodules') are moved; or a callable that is asked about each storage
            (`SavedTensorInfo -> bool | Tier`, or the name of a tier: `"host"`, `"disk"`). What is
            not chosen stays in memory, as does what is told `"device"`.
        memory_budget: bytes that may be held for backward at once, for `policy="auto"`; without
            one, it moves what hides behind compute.
        min_bytes: storages smaller than this stay in memory (and those under 16 KiB always).
        checksum: keep a CRC-32C of what is written and check it when it is read.
        in_flight_bytes: the most that may wait in memory for its write to end; beyond it, forward
            waits. Chosen when None: an eighth of what a pass saves, at least two of its storages.
            Within `memory_budget` a plan takes less of it, and of the next, where it has no room.
        prefetch_bytes: the most that may be brought back ahead of backward; chosen alike.
        spill_bytes: the most that each spill file may take; the disk's limit when None.
        endurance_tbw: terabytes (1e12 bytes) that may be written to the disks in all: their rated
            TBW, less what is spent. A warning comes before; beyond it, tensors stay in memory.
        write_cap_tb: the same per day of running.
        live: show what moves in a table on the terminal, from the first step on.
        staging_bytes: pinned memory through which a GPU's tensors go to disk and come back. A
            storage that is larger takes twice its own size besides, from then on.
        engine: what reads and writes the spill files: `"threads"`, `"io_uring"`, `"cufile"`: for a
            model on a GPU, straight between its memory and the files (GPUDirect Storage), or
            `"auto"`: the one that a short measurement in the first directory shows to be faster.
        num_threads: threads that read and write.
        faults: a plan of I/O faults, for tests.
        streams_of: the streams of a device, for tests.

    Raises:
        TypeError: `model` is no module, a size no integer, a bound no number, a flag neither True
            nor False, or a name in `policy` no string.
        ValueError: there is neither `spill` nor `host_bytes`, `policy` is not known, or a size is
            negative; `engine="cufile"` for a model that is on no GPU, or with `checksum`;
            `policy="auto"` for a model of scripted blocks.
        OSError: a directory cannot be written to, or cuFile does not work there.

    SSDTrain (arXiv 2408.10013) describes the method.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spill: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
        host_bytes: int = 0,
        policy: str | Sequence[str] | Policy = "all",
        *,
        memory_budget: float | None = None,
        min_bytes: int = 1 << 20,
        checksum: bool = False,
        in_flight_bytes: int | None = None,
        prefetch_bytes: int | None = None,
        spill_bytes: int | None = None,
        endurance_tbw: float | None = None,
        write_cap_tb: float | None = None,
        live: bool = False,
        staging_bytes: int = 1 << 30,
        engine: str = "threads",
        num_threads: int = 4,
        faults: FaultPlan | None = None,
        streams_of: StreamsOf = cuda_streams,
    ) -> None:
        check_model(model)
        host_bytes = checked_int("host_bytes", host_bytes, least=0)
        min_bytes = checked_int("min_bytes", min_bytes, least=0)
        staging_bytes = checked_int("staging_bytes", staging_bytes, least=1)
        if memory_budget is not None:
            memory_budget = checked_real("memory_budget", memory_budget)
        if in_flight_bytes is not None:
            in_flight_bytes = checked_int("in_flight_bytes", in_flight_bytes, least=0)
        if prefetch_bytes is not None:
            prefetch_bytes = checked_int("prefetch_bytes", prefetch_bytes, least=0)
        if spill_bytes is not None:
            spill_bytes = checked_int("spill_bytes", spill_bytes, least=1, most=sys.maxsize)
        checksum, live = checked_bool("checksum", checksum), checked_bool("live", live)
        directories = spill_directories(spill)
        is_auto = isinstance(policy, str) and policy == "auto"  # an array of names has no truth
        if memory_budget is not None and not is_auto:
            raise ValueError("memory_budget is kept by policy='auto' only")
        endurance = Endurance(endurance_tbw, write_cap_tb)
        asked = Asked(policy) if callable(policy) else None
        choose = None if is_auto else asked or resolve_policy(policy, model)

        self._model, self._exclusions = model, Exclusions(model)
        self._scopes = Scopes(model, self._exclusions, self._called, self._returned)
        self._rest, self._wear, self._clock = Rest(asked), Wear(endurance), StepClock()
        self._tiers = open_tiers(
            device_of(model),
            directories,
            host_bytes=host_bytes,
            spill_bytes=spill_bytes,
            staging_bytes=staging_bytes,
            checksum=checksum,
            engine=engine,
            num_threads=num_threads,
            faults=faults,
            streams_of=streams_of,
            wear=self._wear,
        )
        budgets = Budgets(in_flight_bytes, prefetch_bytes)
        self._auto: AutoPolicy | None = None
        if choose is None:
            choose = self._auto = AutoPolicy(
                model, self._tiers, self._exclusions, memory_budget, budgets
            )
        self._build_cache(choose, max(min_bytes, SMALLEST_NBYTES), budgets)
        self._active, self._thread = False, 0  # and in which thread
        self._said_thread = False
        self._num_moved = 0  # when the step under way began
        self._live = LiveView(self.report) if live else None
        weakref.finalize(self, _let_go, self._scopes, self._auto).atexit = False

    def _build_cache(self, choose: Policy, min_bytes: int, budgets: Budgets) -> None:
        """The cache between the hooks and the tiers, and what it enters its transfers in."""
        self.ledger = Ledger(max_spans=_MAX_SPANS)
        self._selection = Selection(choose, self._tiers.moves, min_bytes, self._exclusions)
        self._cache = TensorCache(
            self._tiers,
            self._selection,
            self._exclusions,
            self._scopes,
            budgets,
            self.ledger,
            keeps_last=self._auto is None,  # a plan says itself what is kept
        )
        self._hooks = HookStack(self._cache.pack, self._cache.unpack)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ActivationOffload cannot be copied or pickled: its files and threads belong to one "
            "process. Keep it outside of what is copied, and make another for the copy."
        )

    def __enter__(self) -> ActivationOffload:
        if self._active:
            self._end_unended()
        if self._cache.closed:
            raise RuntimeError("this ActivationOffload is closed")
        if capturing():
            raise RuntimeError(CAPTURED)
        self._tiers.end_step()  # a backward behind the last block may have left memory to its loads
        if self._live is not None:
            self._live.start()
        self._clock.begin()
        self._scopes.active = True
        if self._auto is not None:
            self._auto.begin_step(self._cache)
        self._rest.begin(self._auto is None or self._auto.plan is not None)
        self._num_moved = self._cache.num_moved
        self._hooks.pop()  # from what an interrupt in the middle of a beginning left
        if self._rest.resting:
            self._scopes.remove_inner()
        else:
            self._look()
        self._thread, self._active = threading.get_ident(), True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._active:
            return  # a block within it has ended it
        self._active = False
        if not self._hooks.pop() and not self._rest.resting:
            self._hooks.pull()
        self._scopes.active = False
        if error is None:
            self._cache.poll()
        else:
            with suppress(RuntimeError):  # of a lost device, or a capture: `error` tells of it
                self._cache.recount()
        self._tiers.end_step()
        self._clock.end()
        self._wear.foresee(self._tiers.disk_nbytes)
        if self._scopes.num_compiled < 2:  # else what is moved may be all of one block's
            self._cache.regions.say(stacklevel=3)
        if self._auto is not None:
            self._auto.leave()
            if error is None:
                self._auto.end_step(self._cache)
        if error is None:
            self._rest.end(self._cache.num_moved - self._num_moved)

    def _end_unended(self) -> None:
        """Ends the last block, whose `__exit__` an interrupt may have cut off before it began."""
        if self._thread != threading.get_ident():
            raise RuntimeError(
                "this ActivationOffload is already active in another thread: make one for each"
            )
        warnings.warn(
            "activation offload: a block begins before the last one has ended: it is nested, or an "
            "interrupt cut off the end of the last. That one ends here; results do not change.",
            RuntimeWarning,
            stacklevel=3,
        )
        self.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)

    def _look(self) -> None:
        """From here on this thread's saved tensors pass through the hooks."""
        self._exclusions.refresh()
        self._scopes.install()
        self._hooks.push()

    @property
    def looks(self) -> bool:
        """Whether this thread's saved tensors pass through the hooks of this offload."""
        return self._hooks.on_top

    def _called(self, args: Any, kwargs: Any) -> bool:
        """The model is called: for the hooks on it."""
        if threading.get_ident() != self._thread and not self._said_thread:
            self._warn_of_thread()
        if self._auto is not None:
            self._auto.called(args, kwargs, self._cache)
        wakes = self._rest.wakes(self._model, self._exclusions.num_trained, args, kwargs)
        if wakes:
            self._look()
        return wakes or not self._rest.resting

    def _warn_of_thread(self) -> None:
        if self.looks or not torch.is_grad_enabled() or in_backward():
            return
        self._said_thread = True
        warnings.warn(
            "activation offload: the model runs on another thread than the one that entered the "
            "block, as under nn.DataParallel (which a Trainer takes where it sees several GPUs): "
            "nothing that it saves there is moved. Start a process for each GPU: torchrun.",
            RuntimeWarning,
            stacklevel=4,
        )

    def _returned(self) -> None:
        """The model has returned: what began with this call ends with it."""
        if self._rest.resting:
            self._hooks.pop()

    @contextmanager
    def microbatch(self, index: int) -> Iterator[None]:
        """What is saved in this block belongs to microbatch `index`.

        Each microbatch is prefetched in its own order: use it around the forward of each when
        several forwards run before their backwards (gradient accumulation in a pipeline).
        """
        passes = self._cache.passes
        before, passes.microbatch = passes.microbatch, index
        try:
            yield
        finally:
            passes.microbatch = before

    def expect_backward(self, index: int = 0) -> None:
        """Begins to bring back what the backward of microbatch `index` will want first.

        A pipeline schedule calls this when it knows the next stage; without it the first tensors
        are read when backward asks for them.
        """
        self._cache.expect_backward(index)

    def expect_forward(self, *inputs: Any) -> None:
        """Says, within the block, what the step works on where `model` itself is not called.

        Its parts may be: what is a `LightningModule`'s `training_step`, say. As with the arguments
        of a call, the tensors in `inputs` are left alone, and their sizes tell steps apart.
        """
        self._scopes.expect(inputs, {})

    def report(self) -> OffloadReport:
        """What was saved, where it went and what it cost, since the object was made."""
        self._cache.poll()
        return make_report(
            self._cache.counters,
            self._cache.held.nbytes,
            self._selection.min_bytes,
            self._cache.account.by_module,
            self._pace(),
            self._tiers.peaks(),
            self._selection.kept_nameless,
        )

    def _pace(self) -> Pace:
        written = self._tiers.disk_nbytes
        days = self._wear.days_left(written) if self._wear.endurance.tbw is not None else None
        if days == float("inf"):
            days = None
        rate = self._wear.written_tb_per_day(written)
        return Pace(self._clock.num_steps, self._clock.step_s, rate, days, self._rest.num_steps)

    def live(self) -> LiveView:
        """`with offload.live():` shows what moves in a table on the terminal (needs rich)."""
        return LiveView(self.report)

    @property
    def forecast(self) -> Forecast | None:
        """Step time and peak that the plan of `policy="auto"` is predicted to show."""
        return None if self._auto is None else self._auto.forecast

    @property
    def measured(self) -> Forecast | None:
        """What the steps since the plan showed, in the terms of `forecast`.

        Those with inputs of about the sizes that it was made from; None before one.
        """
        return None if self._auto is None else self._auto.measured()

    @property
    def plan(self) -> Plan | None:
        """The plan of `policy="auto"`, once there is one."""
        return None if self._auto is None else self._auto.plan

    def explain(self) -> str:
        """The plan of `policy="auto"` as a table: prediction, and measurement since.

        Raises RuntimeError for another policy.
        """
        if self._auto is None:
            raise RuntimeError("explain: there is a plan only with policy='auto'")
        return self._auto.explain()

    def trace(self, path: str | Path) -> None:
        """Writes stores, loads and waits as a Chrome trace (`chrome://tracing`, Perfetto).

        The first 100,000 since the object was made, which is how many are kept in memory (18 MB);
        `otherData` tells how many came later.
        """
        self._cache.poll()
        self.ledger.chrome_trace(path)

    def close(self) -> None:
        """Ends all transfers and gives the files back. Closing twice is harmless.

        What is only on disk can not be unpacked afterwards: close after the last backward.
        """
        if self._live is not None:
            self._live.stop()
        _let_go(self._scopes, self._auto)
        self._cache.close()


def _let_go(scopes: Scopes, auto: AutoPolicy | None) -> None:
    """Takes off the model what would keep the files and threads of a forgotten offload open."""
    scopes.remove()
    if auto is not None:
        auto.remove()
