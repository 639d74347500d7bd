"""Gathers of rows kept small, of rows that repeat or are hot, and the requests of each row size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

import dataeff
from dataeff import _core
from dataeff._ops import row_table
from dataeff.bench import ceilings
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.features.hotness import access_counts
from dataeff.features.quantised import STORED_DTYPES, Store, aligned_empty

NUM_INDICES = 8
HOT_SHARE = 0.1
# Bytes a row; those of dgl#6635 among them (188, 353, 1412).
REQUEST_ROW_NBYTES = (32, 64, 100, 128, 160, 188, 256, 353, 400, 512, 1000, 1024, 1412, 2408, 4096)


@dataclass(frozen=True)
class Inputs:
    """A host table and index tensors on the device, one a call in turn."""

    x: Tensor
    indices: tuple[Tensor, ...]

    def each_call(self, gather: Callable[[Tensor], Any]) -> Callable[[], Any]:
        """`gather` of the next index at every call."""
        turns = cycle(self.indices)
        return lambda: gather(next(turns))


def small_row_cases(options: Options) -> Iterator[Case]:
    """Float32 rows delivered from tables that keep them as they are and smaller."""
    table_nbytes, out_nbytes = options.pick(full=(1 << 30, 1 << 26), quick=(1 << 28, 1 << 24))
    for dim in options.pick(full=(32, 128, 512), quick=(128,)):
        num_rows, num_ids = table_nbytes // (dim * 4), out_nbytes // (dim * 4)
        nbytes = num_ids * dim * 4
        stores: tuple[Store, ...] = ("fp16", "bf16", "int8", "fp8")
        yield Case(
            size=f"rows={num_rows} dim={dim} ids={num_ids} small rows to f32",
            group="rows kept small, read as float32",
            inputs=partial(_uniform, num_rows, dim, num_ids, options.device),
            providers=(
                Provider("torch.index_select of f32", _index_select),
                Provider("torch.index_select of f16, then .float()", _half_then_float),
                Provider("dataeff f32", partial(_ours, None), role="ours"),
                *(Provider(f"dataeff {s}", partial(_ours, s), role="ours") for s in stores),
            ),
            ceilings=(_ceiling(options, nbytes),),
            nbytes=nbytes,
            # fp8's bound of 2^-4 of a value, and int8's of 1/254 of a row's largest.
            tolerance=(0.07, 0.05),
        )


def power_law_cases(options: Options) -> Iterator[Case]:
    """Ids of a power law, as a sampler's: rows that repeat, and rows worth keeping hot."""
    num_rows, num_ids = options.pick(full=(1_000_000, 250_000), quick=(500_000, 100_000))
    for dim in options.pick(full=(64, 256), quick=(64,)):
        nbytes = num_ids * dim * 4
        yield Case(
            size=f"rows={num_rows} dim={dim} ids={num_ids} f32 power law",
            group="rows asked for by a power law",
            inputs=partial(_power_law, num_rows, dim, num_ids, options.device),
            providers=(
                Provider("torch.index_select of f32", _index_select),
                Provider("dataeff f32", partial(_ours, None), role="ours"),
                Provider("dataeff unique", _unique, role="ours"),
                Provider("dataeff 10 % hot", partial(_hot, "static"), role="ours"),
                Provider("dataeff 10 % hot, adaptive", partial(_hot, "adaptive"), role="ours"),
            ),
            ceilings=(_ceiling(options, nbytes),),
            nbytes=nbytes,
        )


def request_cases(options: Options) -> Iterator[Case]:
    """128-byte requests a row, by row size: of the CUDA gather, and of one without its shift.

    They are counted by the kernel's own index arithmetic, run on the host, so no GPU is needed.
    """
    num_rows = 20_000
    for row_nbytes in options.pick(full=REQUEST_ROW_NBYTES, quick=(100, 128, 353)):
        yield Case(
            size=f"requests of rows of {row_nbytes} B",
            group="requests on the bus",
            inputs=partial(_bytes, num_rows, row_nbytes, options.device),
            providers=(
                Provider("torch.index_select", _index_select),
                Provider("dataeff", _counted, role="ours"),
            ),
            nbytes=num_rows * row_nbytes,
        )


def _ceiling(options: Options, nbytes: int) -> Provider:
    on_gpu = options.device.type == "cuda"
    return ceilings.host_to_device(nbytes) if on_gpu else ceilings.memcpy(nbytes)


def _uniform(num_rows: int, dim: int, num_ids: int, device: torch.device) -> Inputs:
    ids = (torch.randint(num_rows, (num_ids,)).to(device) for _ in range(NUM_INDICES))
    return Inputs(torch.randn(num_rows, dim), tuple(ids))


def _power_law(num_rows: int, dim: int, num_ids: int, device: torch.device) -> Inputs:
    # Rank r is drawn about as r^-1, which a uniform exponent gives; ranks are spread over the rows.
    rows = torch.randperm(num_rows)

    def draw() -> Tensor:
        ranks = num_rows ** torch.rand(num_ids, dtype=torch.float64)
        return rows[ranks.long().clamp_(max=num_rows) - 1].to(device)

    return Inputs(torch.randn(num_rows, dim), tuple(draw() for _ in range(NUM_INDICES)))


def _bytes(num_rows: int, row_nbytes: int, device: torch.device) -> Inputs:
    # From a multiple of 128 on, so that the counts are of the row size and not of the allocator.
    x = aligned_empty(torch.Size((num_rows, row_nbytes)), torch.uint8).random_()
    return Inputs(x, (torch.randperm(num_rows).to(device),))


def _index_select(inputs: Inputs) -> Step:
    x = inputs.x
    return Step(inputs.each_call(lambda ids: x.index_select(0, ids.cpu()).to(ids.device)))


def _half_then_float(inputs: Inputs) -> Step:
    x = inputs.x.half()
    return Step(inputs.each_call(lambda ids: x.index_select(0, ids.cpu()).to(ids.device).float()))


def _ours(store: Store | None, inputs: Inputs) -> Step:
    table = dataeff.FeatureTable(inputs.x, store=store)
    ids, dim = inputs.indices[0], inputs.x.shape[1]
    itemsize = 4 if store is None else STORED_DTYPES[store].itemsize
    kept = dim * itemsize + (4 if itemsize == 1 else 0)
    return Step(
        inputs.each_call(lambda ids: table[ids]),
        close=table.close,
        metrics=lambda: {"bytes_read_per_row": (float(kept), "B")},
        nbytes=len(ids) * dim * 4,
    )


def _unique(inputs: Inputs) -> Step:
    if not inputs.indices[0].is_cuda:
        raise Unavailable("a CPU finds repeated rows in its caches: there is no bus to spare")
    table = dataeff.FeatureTable(inputs.x)
    return Step(
        inputs.each_call(lambda ids: table.gather(ids, unique=True)),
        close=table.close,
        metrics=lambda: {"rows_read": (table.stats().num_rows / table.stats().num_gathers, "rows")},
    )


def _hot(policy: Any, inputs: Inputs) -> Step:
    if not inputs.indices[0].is_cuda:
        raise Unavailable("there is no GPU to keep rows on")
    num_rows = len(inputs.x)
    score = access_counts(inputs.indices, num_rows) if policy == "static" else None
    hot = dataeff.HotRows(int(HOT_SHARE * num_rows), score, policy=policy)
    table = dataeff.FeatureTable(inputs.x, hot=hot)

    def metrics() -> dict[str, tuple[float, str]]:
        stats = table.stats()
        return {"hit_rate": (stats.num_hot_rows / stats.num_rows, "hits/row")}

    return Step(inputs.each_call(lambda ids: table[ids]), close=table.close, metrics=metrics)


def _counted(inputs: Inputs) -> Step:
    table, ids = dataeff.FeatureTable(inputs.x), inputs.indices[0].cpu()
    where = (ids.data_ptr(), ids.numel(), ids.element_size())
    shifted, plain = _core.count_requests(*row_table(inputs.x), *where)

    def metrics() -> dict[str, tuple[float, str]]:
        return {
            "requests_per_row": (shifted / len(ids), "requests"),
            "requests_per_row_unshifted": (plain / len(ids), "requests"),
        }

    return Step(inputs.each_call(lambda ids: table[ids]), close=table.close, metrics=metrics)
