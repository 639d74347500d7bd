"""How step and peak grow: with layers, sequence, batch, directories and the in-flight budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from dataeff.bench.case import Case, Options, Provider
from dataeff.bench.offload.model import Shape
from dataeff.bench.offload.training import disk, keep, make_inputs

BASE = Shape(4, 256, 4, 128)
BUDGET_S = 4.0  # of each of its many cases


def cases(options: Options) -> Iterator[Case]:
    """Small steps of one GPT, one thing larger at a time."""
    for layers in options.pick(full=(2, 8, 16), quick=(2,)):
        yield _case("layers", replace(BASE, layers=layers), options)
    if options.quick:
        return
    for tokens in (256, 512, 1024):
        yield _case("tokens", replace(BASE, tokens=tokens), options)
    for batch in (2, 8, 16):
        yield _case("batch", replace(BASE, batch=batch), options)
    for directories in (2, 4):
        yield _case("directories", BASE, options, directories=directories)
    for mib in (1, 4, 16):
        yield _case("in flight", BASE, options, in_flight_bytes=mib << 20)


def _case(what: str, shape: Shape, options: Options, **given: Any) -> Case:
    said = "".join(f" {name}={value}" for name, value in given.items())
    return Case(
        size=f"growth of {what}: {shape}{said}",
        group=f"growth of {what}",
        inputs=partial(make_inputs, shape, options),
        budget_s=BUDGET_S,
        providers=(
            Provider("keep", keep),
            Provider("dataeff disk", partial(disk, **given), role="ours"),
        ),
    )
