"""What a workload describes: cases, their providers, and the step each provider repeats."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

Role = Literal["ours", "peer", "ceiling"]
T = TypeVar("T")


class Unavailable(Exception):
    """Raised by a provider that cannot run here, while it is set up or by its first call.

    Its message is the reason that is recorded.
    """


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Options:
    """How long and where to run.

    Attributes:
        quick: small sizes and few rounds, for a check that takes seconds.
        device: where the work is done; CUDA when there is a GPU.
        directory: where workloads that use files put them.
        seed: seeds the inputs and every provider's set-up.
        only: run the cases whose size holds this text.
    """

    quick: bool = False
    device: torch.device = field(default_factory=_default_device)
    directory: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    seed: int = 0
    only: str = ""

    @property
    def num_rounds(self) -> int:
        """Rounds per case, unless `budget_s` ends them earlier."""
        return self.pick(full=15, quick=5)

    @property
    def num_warmups(self) -> int:
        """Untimed calls of each provider after the one whose result is compared."""
        return self.pick(full=3, quick=1)

    @property
    def budget_s(self) -> float:
        """Seconds of timing per case; at least three rounds are made even if they take longer."""
        return self.pick(full=30.0, quick=4.0)

    @property
    def min_sample_s(self) -> float:
        """Calls shorter than this are repeated within one sample until they fill it."""
        return self.pick(full=5e-3, quick=1e-3)

    def pick(self, full: T, quick: T) -> T:
        """`quick` in a quick run, else `full`."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Step:
    """The work one provider repeats.

    Attributes:
        call: the timed work; its return value is compared between providers.
        before: untimed, run before each call (clear gradients, drop a cache).
        close: run after the last call, also when something failed.
        metrics: figures beside the time, name -> (value, unit), asked for after the last call.
        seconds: what the last call took by its own account, where the start of a program of its
            own, fio say, is not to count.
        nbytes: bytes one call moves, where it differs from the case's.
        flops: floating-point operations of one call, where they differ from the case's.
        kernels: (bytes, flops) of each kernel of one call. They run one after another, so that
            `share_of_roofline` adds up, over kernels, the longer of the times that the ceilings of
            bytes and of flops give, and divides by the call's.
    """

    call: Callable[[], Any]
    before: Callable[[], object] | None = None
    close: Callable[[], object] | None = None
    metrics: Callable[[], Mapping[str, tuple[float, str]]] | None = None
    seconds: Callable[[], float] | None = None
    nbytes: int | None = None
    flops: int | None = None
    kernels: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    Attributes:
        name: what the tables call it; a re-implemented access pattern is named 'pattern of X'.
        make: sets up from the case's inputs, untimed, and returns the step.
        role: `ours` and `peer` are compared; a `ceiling` is what neither can exceed.
        requires: modules without which the provider is skipped.
    """

    name: str
    make: Callable[[Any], Step]
    role: Role = "peer"
    requires: tuple[str, ...] = ()

    def prepare(self, inputs: Any) -> Step:
        """Sets up the step; raises Unavailable naming a required module that cannot be had."""
        for module in self.requires:
            if find_spec(module) is None:
                raise Unavailable(f"the package {module} is not installed")
        try:
            return self.make(inputs)
        except ImportError as error:
            if not self.requires:
                raise
            # It may be there without the libraries that it needs.
            raise Unavailable(f"{', '.join(self.requires)} does not load: {error}") from error


@dataclass(frozen=True)
class Case:
    """One size of one workload.

    Attributes:
        size: what is varied, as `name=value` pairs.
        inputs: makes what all providers share; torch's generators are seeded before.
        providers: the first defines the result; the others must return the same.
        ceilings: timed in the same rounds (`dataeff.bench.ceilings`).
        nbytes: bytes that one call has to move; 0 gives no bandwidth.
        flops: floating-point operations of one call; 0 gives no rate.
        tolerance: (rtol, atol) of the comparison; zeros ask for equality.
        same: replaces the comparison: takes (expected, actual), raises AssertionError.
        budget_s: seconds of timing, where they are fewer than the options say.
        settle_s: seconds for which rounds go on beyond their number while times are unsettled:
            fewer than a second of them, or a spread of more than a tenth.
        long_call_s: a peer whose first call takes longer, or ours at thirty times as long, is
            called in the first round only.
        num_calls: how often each provider is called in all, where that matters; else the options
            say how many rounds there are.
        group: what the case is one size of, for summaries; the workload's name by default.
    """

    size: str
    inputs: Callable[[], Any]
    providers: tuple[Provider, ...]
    ceilings: tuple[Provider, ...] = ()
    nbytes: int = 0
    flops: int = 0
    tolerance: tuple[float, float] = (0.0, 0.0)
    same: Callable[[Any, Any], None] | None = None
    budget_s: float = float("inf")
    settle_s: float = 0.0
    long_call_s: float = float("inf")
    num_calls: int | None = None
    group: str = ""

    def assert_same(self, expected: Any, actual: Any) -> None:
        """Raises AssertionError when a provider's result is not the first provider's."""
        if self.same is not None:
            self.same(expected, actual)
            return
        rtol, atol = self.tolerance
        torch.testing.assert_close(
            actual, expected, rtol=rtol, atol=atol, equal_nan=True, check_device=False
        )
