"""The benchmark frame: ours and its peers in one process, round by round, beside the ceilings.

A workload is a module of this package with one function, `cases(options)`; its name must stand in
`NAMES`. It describes what to time and leaves the timing to `dataeff.bench.runner`:

    def cases(options: Options) -> Iterator[Case]:
        for dim in options.pick(full=(32, 128, 512), quick=(128,)):
            yield Case(
                size=f"rows=1000000 dim={dim}",
                inputs=partial(make_inputs, dim, options.device),  # called once, already seeded
                providers=(
                    Provider("torch.index_select", index_select),  # the first defines the result
                    Provider("cupy.take", cupy_take, requires=("cupy",)),
                    Provider("dataeff", ours, role="ours"),
                ),
                ceilings=(ceilings.memcpy(nbytes),),  # timed in the same rounds
                nbytes=nbytes,  # moved by one call: gives bandwidth_gbs and the share of a ceiling
            )

    def ours(inputs: Inputs) -> Step:  # set up here, untimed; raise Unavailable(reason) to decline
        table = dataeff.FeatureTable(inputs.x)
        return Step(lambda: table[inputs.index], close=table.close)

Listing the cases must be cheap: whatever is large is made in `inputs` or in a provider's function.
Each call's return value is compared with the first provider's before anything is timed, so it
holds everything the work is for (a training step returns its loss and gradients). `tolerance`
loosens the comparison; `same` replaces it where equal values are not to be expected (samplers).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial

from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.record import Record, read, write
from dataeff.bench.runner import DisagreementError, run_case, run_workload

__all__ = [
    "NAMES",
    "Case",
    "DisagreementError",
    "Options",
    "Provider",
    "Record",
    "Step",
    "Unavailable",
    "cases",
    "read",
    "run_case",
    "workloads",
    "write",
]

NAMES = ("gather", "sample", "rgnn", "offload", "storage")


def workloads() -> dict[str, Callable[..., list[Record]]]:
    """Each workload of `NAMES`, to be called with (options, say, keep)."""
    return {name: partial(_run, name) for name in NAMES}


def cases(name: str, options: Options) -> Iterator[Case]:
    """The cases of the workload `name`, or of the curve "offload.rok", not yet run."""
    module = importlib.import_module(f"{__name__}.{name}")
    found: Iterator[Case] = module.cases(options)
    return (case for case in found if options.only in case.size)


def _run(
    name: str, options: Options, say: Callable[[str], None], keep: Callable[[list[Record]], None]
) -> list[Record]:
    return run_workload(name, cases(name, options), options, say, keep)
