"""Rows of a host table by random index, delivered where the index lives.

With a GPU the index is there, as a GPU sampler leaves it, and peers fetch it, gather on the CPU
and copy the rows over; without one everything stays on the host. Ids are uniform and the table is
larger than the caches; each call takes the next of several index tensors, so that no call finds its
rows cached by the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import dataeff
from dataeff.bench import ceilings, gather_disk, gather_stored
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable

NUM_INDICES = 8


@dataclass(frozen=True)
class Inputs:
    """The table, [num_rows, dim] on the host, and index tensors on the device."""

    x: Tensor
    indices: tuple[Tensor, ...]

    def each_call(self, gather: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """`gather` of the next index at every call."""
        turns = cycle(self.indices)
        return lambda: gather(next(turns))


def cases(options: Options) -> Iterator[Case]:
    """Rows of 64 to 1024 bytes; rows small, repeated, hot; requests by size; rows on disk."""
    num_rows, num_ids = options.pick(full=(2_000_000, 500_000), quick=(500_000, 100_000))
    on_gpu = options.device.type == "cuda"
    for dim in options.pick(full=(16, 64, 128, 256), quick=(16, 128)):
        nbytes = num_ids * dim * 4
        yield Case(
            size=f"rows={num_rows} dim={dim} ids={num_ids} f32",
            inputs=partial(make_inputs, num_rows, dim, num_ids, options.device),
            providers=(
                Provider("torch.index_select", _index_select),
                Provider("x[index]", _plain_indexing),
                Provider("index_select into pinned memory", _pinned),
                Provider("index_select into a buffer", _index_select_out),
                Provider("dataeff", _ours, role="ours"),
                Provider("dataeff into a buffer", _ours_out, role="ours"),
            ),
            ceilings=(ceilings.host_to_device(nbytes) if on_gpu else ceilings.memcpy(nbytes),),
            nbytes=nbytes,
        )
    yield from gather_stored.small_row_cases(options)
    yield from gather_stored.power_law_cases(options)
    yield from gather_stored.request_cases(options)
    yield from gather_disk.cases(options)


def make_inputs(num_rows: int, dim: int, num_ids: int, device: torch.device) -> Inputs:
    """A random table and `NUM_INDICES` tensors of uniform ids."""
    x = torch.randn(num_rows, dim)
    ids = (torch.randint(num_rows, (num_ids,)).to(device) for _ in range(NUM_INDICES))
    return Inputs(x, tuple(ids))


def _index_select(inputs: Inputs) -> Step:
    x = inputs.x
    return Step(inputs.each_call(lambda ids: x.index_select(0, ids.cpu()).to(ids.device)))


def _plain_indexing(inputs: Inputs) -> Step:
    x = inputs.x
    return Step(inputs.each_call(lambda ids: x[ids.cpu()].to(ids.device)))


def _pinned(inputs: Inputs) -> Step:
    ids = inputs.indices[0]
    if not ids.is_cuda:
        raise Unavailable("there is no GPU to copy to")
    staged = torch.empty(len(ids), inputs.x.shape[1], pin_memory=True)

    def gather(ids: Tensor) -> Tensor:
        # The copy has left `staged` before this returns: the next call writes it again.
        torch.index_select(inputs.x, 0, ids.cpu(), out=staged)
        return staged.to(ids.device)

    return Step(inputs.each_call(gather))


def _buffer(inputs: Inputs) -> Tensor:
    # Touched, so that no provider pays for the first use of its pages.
    ids = inputs.indices[0]
    return torch.zeros(len(ids), inputs.x.shape[1], device=ids.device)


def _index_select_out(inputs: Inputs) -> Step:
    if inputs.indices[0].is_cuda:
        raise Unavailable("torch gathers from the host into host memory only")
    out = _buffer(inputs)
    return Step(inputs.each_call(lambda ids: torch.index_select(inputs.x, 0, ids, out=out)))


def _ours_out(inputs: Inputs) -> Step:
    table, out = dataeff.FeatureTable(inputs.x), _buffer(inputs)
    return Step(inputs.each_call(lambda ids: table.gather(ids, out=out)), close=table.close)


def _ours(inputs: Inputs) -> Step:
    table = dataeff.FeatureTable(inputs.x)
    return Step(inputs.each_call(lambda ids: table[ids]), close=table.close)
