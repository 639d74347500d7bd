"""How the gather grows: with the rows of the table, the ids of a call, and threads.

One thing is varied at a time around a table of a million rows of 64 bytes and 100 000 ids a call;
the size of a row is varied by `dataeff.bench.gather`. Ours and torch read the same memory, on huge
pages, into buffers of their own. Tables that the machine's memory would not hold twice are
skipped, with the reason as a record.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dataeff
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.gather_peers import Inputs
from dataeff.bench.rgnn.workload import available_bytes
from dataeff.memory.huge_pages import on_huge_pages

DIM = 16
NUM_ROWS = 10**6
NUM_IDS = 10**5
TABLE_ROWS = (10**5, 10**6, 10**7, 10**8)
CALL_IDS = (10**2, 10**3, 10**4, 10**6)
NUM_INDICES = 8


def cases(options: Options) -> Iterator[Case]:
    """Tables of 1e5 to 1e8 rows, calls of 1e2 to 1e6 ids, and 1, 2, 4 ... threads on a CPU."""
    if options.quick:
        return
    for num_rows in TABLE_ROWS:
        case = _case("growth of the table:", num_rows, NUM_IDS, options.device)
        wanted, free = 2 * num_rows * DIM * 4, available_bytes()
        if wanted > free:
            case = _skipped(case, f"needs {wanted} bytes of memory and {free} are free")
        yield case
    for num_ids in CALL_IDS:
        yield _case("growth of the call:", NUM_ROWS, num_ids, options.device)
    if options.device.type == "cpu":
        for num_threads in thread_counts(os.cpu_count() or 1):
            yield _case("growth of threads:", NUM_ROWS, NUM_IDS, options.device, num_threads)


def _skipped(case: Case, reason: str) -> Case:
    def decline(inputs: None) -> Step:
        raise Unavailable(reason)

    providers = tuple(replace(provider, make=decline) for provider in case.providers)
    return replace(case, inputs=lambda: None, providers=providers)


def thread_counts(num_cores: int) -> list[int]:
    """Powers of two below the number of cores, and that number."""
    return [*(1 << i for i in range((num_cores - 1).bit_length())), num_cores]


def _case(
    what: str, num_rows: int, num_ids: int, device: torch.device, num_threads: int | None = None
) -> Case:
    threads = "" if num_threads is None else f" threads={num_threads}"
    return Case(
        size=f"{what} rows={num_rows} dim={DIM} ids={num_ids} i32{threads}",
        group=what.rstrip(":"),
        inputs=partial(make_inputs, num_rows, num_ids, device),
        providers=(
            Provider("torch.index_select", partial(_index_select, num_threads)),
            Provider("dataeff", partial(_ours, num_threads), role="ours"),
        ),
        nbytes=num_ids * DIM * 4,
    )


def make_inputs(num_rows: int, num_ids: int, device: torch.device) -> Inputs:
    """A table whose elements are all different, and ids."""
    x = on_huge_pages(torch.empty(num_rows, DIM, dtype=torch.int32))
    torch.arange(num_rows * DIM, dtype=torch.int32, out=x.view(-1))
    ids = (torch.randint(num_rows, (num_ids,)).to(device) for _ in range(NUM_INDICES))
    return Inputs(x, tuple(ids))


def _with_threads(num_threads: int | None, call: Callable[[], Any]) -> Callable[[], Any]:
    if num_threads is None:
        return call

    def called() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return called


def _buffer(inputs: Inputs) -> Tensor:
    ids = inputs.indices[0]
    return torch.zeros(len(ids), DIM, dtype=torch.int32, device=ids.device)


def _index_select(num_threads: int | None, inputs: Inputs) -> Step:
    x = inputs.x
    if inputs.indices[0].is_cuda:
        call = inputs.each_call(lambda ids: x.index_select(0, ids.cpu()).to(ids.device))
    else:
        out = _buffer(inputs)
        call = inputs.each_call(lambda ids: torch.index_select(x, 0, ids, out=out))
    return Step(_with_threads(num_threads, call))


def _ours(num_threads: int | None, inputs: Inputs) -> Step:
    table, out = dataeff.FeatureTable(inputs.x, huge_pages=False), _buffer(inputs)
    call = inputs.each_call(lambda ids: table.gather(ids, out=out))
    return Step(_with_threads(num_threads, call), close=table.close)
