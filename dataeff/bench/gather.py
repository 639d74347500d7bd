"""Rows of a host table by random index, delivered where the index lives.

With a GPU the index is there, as a GPU sampler leaves it, and peers fetch it, gather on the CPU
and copy the rows over; without one everything stays on the host. Ids are uniform and the table is
larger than the caches; each call takes the next of several index tensors, so that no call finds its
rows cached by the one before. Our table gets a copy of the peers': it moves into huge pages, which
is part of what it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

import dataeff
from dataeff.bench import (
    ceilings,
    gather_blocks,
    gather_disk,
    gather_growth,
    gather_peers,
    gather_stored,
)
from dataeff.bench.case import Case, Options, Provider, Step
from dataeff.bench.gather_peers import Inputs

NUM_INDICES = 8
ROW_NBYTES = (64, 128, 256, 512, 1024, 2048, 4096)
# Seconds of timing a case, of which there are about forty.
BUDGET_S = 6.0
# Of these, short rounds may go on for so many: half a second of another program decides nothing.
SETTLE_S = 4.0


def cases(options: Options) -> Iterator[Case]:
    """Rows of 64 to 4096 bytes; rows repeated, hot, small; requests by size; rows on disk."""
    for case in (
        *_row_size_cases(options),
        *gather_stored.power_law_cases(options),
        *gather_blocks.cases(options),
        *gather_stored.small_row_cases(options),
        *gather_stored.request_cases(options),
        *gather_disk.cases(options),
        *gather_growth.cases(options),
    ):
        settle_s = options.pick(full=SETTLE_S, quick=0.0)
        yield replace(case, budget_s=min(case.budget_s, BUDGET_S), settle_s=settle_s)


def _row_size_cases(options: Options) -> Iterator[Case]:
    table_nbytes, out_nbytes = options.pick(full=(1 << 30, 1 << 26), quick=(1 << 28, 1 << 24))
    on_gpu = options.device.type == "cuda"
    for row_nbytes in options.pick(full=ROW_NBYTES, quick=(64, 512, 4096)):
        num_rows, num_ids = table_nbytes // row_nbytes, out_nbytes // row_nbytes
        ceiling = ceilings.host_to_device if on_gpu else ceilings.memcpy
        new = Provider("dataeff", _ours, role="ours")
        kept = Provider("dataeff into a buffer", _ours_out, role="ours")
        # The fresh pages of a new host tensor cost as much as its rows: like is held against like.
        if on_gpu:
            kinds = {"": (*gather_peers.to_new_tensors(), new, kept)}
        else:
            kinds = {
                " into a buffer": (*gather_peers.to_a_buffer(), kept),
                "": (*gather_peers.to_new_tensors(), new),
            }
        for kind, providers in kinds.items():
            yield Case(
                size=f"rows={num_rows} dim={row_nbytes // 4} ids={num_ids} f32{kind}",
                group=f"random rows of 64 to 4096 bytes{kind}",
                inputs=partial(make_inputs, num_rows, row_nbytes // 4, num_ids, options.device),
                providers=providers,
                ceilings=(ceiling(out_nbytes),),
                nbytes=out_nbytes,
            )


def make_inputs(num_rows: int, dim: int, num_ids: int, device: torch.device) -> Inputs:
    """A random table and `NUM_INDICES` tensors of uniform ids."""
    x = torch.randn(num_rows, dim)
    ids = (torch.randint(num_rows, (num_ids,)).to(device) for _ in range(NUM_INDICES))
    return Inputs(x, tuple(ids))


def _ours(inputs: Inputs) -> Step:
    table = dataeff.FeatureTable(inputs.x.clone())
    return Step(inputs.each_call(lambda ids: table[ids]), close=table.close)


def _ours_out(inputs: Inputs) -> Step:
    table, out = dataeff.FeatureTable(inputs.x.clone()), inputs.buffer()
    return Step(inputs.each_call(lambda ids: table.gather(ids, out=out)), close=table.close)
