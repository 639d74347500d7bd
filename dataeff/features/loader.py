"""Batches with their rows: sampled, gathered and trained on at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dataeff._integers import checked_int
from dataeff.features.delivery import Delivery
from dataeff.features.pipeline import pipelined
from dataeff.features.prefetch import Prefetch
from dataeff.features.table import FeatureTable

Tables: TypeAlias = FeatureTable | Mapping[str, FeatureTable]
Index: TypeAlias = Tensor | Mapping[str, Tensor]
Fetched: TypeAlias = Tensor | dict[str, Tensor]


class FeatureLoader:
    """Yields `(batch, rows)`: while one batch trains, the next is gathered and later ones sampled.

    Each step does what these lines do, ahead of time and in the same order:

        for item in items:
            batch = sample(item)
            yield batch, table[batch.n_id.to(device)]

    Samples are drawn in threads, up to `depth` of them ahead; what they do on a GPU, that of
    `device` or the current one, on a stream beside the caller's, behind what made their items. The
    rows of one further batch are on their way by `table.prefetch`: on the CPU in the table's
    thread, on CUDA on its stream, begun from the caller's thread so that the caller's stream orders
    the reuse of memory. At most `depth` sampled batches and two batches of rows exist besides the
    one in use. An exception is raised where its batch would have come; leaving the loop at any
    moment cancels samples that have not begun and waits for those that have, and rows on their way
    arrive unseen.

    Args:
        items: what to sample from, drawn in the caller's thread, so that what they take from
            random generators depends on no timing; iterated anew by each `iter()`.
        table: its rows go with each batch; for several node types a mapping by type (types absent
            from a batch's index are skipped).
        sample: makes a batch of an item; the items are the batches by default.
        index: which rows a batch needs: a tensor, or a mapping by type. By default `batch.n_id`,
            or the batch itself when it is a tensor.
        device: where rows are wanted; where the index is by default.
        num_threads: threads that sample; 0 samples in the caller's.
        depth: sampled batches ahead, at least 1.

    Raises:
        TypeError: a table is none; `num_threads` or `depth` is no integer.
        ValueError: `num_threads` or `depth` is too small.

    Example:
        >>> table = dataeff.FeatureTable(torch.arange(6.0).view(3, 2))
        >>> [rows.tolist() for ids, rows in dataeff.FeatureLoader([torch.tensor([2])], table)]
        [[[4.0, 5.0]]]
    """

    def __init__(
        self,
        items: Iterable[Any],
        table: Tables,
        sample: Callable[[Any], Any] | None = None,
        *,
        index: Callable[[Any], Index] | None = None,
        device: torch.device | str | None = None,
        num_threads: int = 1,
        depth: int = 2,
    ) -> None:
        for one in table.values() if isinstance(table, Mapping) else (table,):
            if not isinstance(one, FeatureTable):
                raise TypeError(f"rows come from a FeatureTable, got a {type(one).__name__}")
        num_threads = checked_int("num_threads", num_threads, least=0)
        depth = checked_int("depth", depth, least=1)
        self.items, self.table, self.sample = items, table, sample
        self.index = node_ids if index is None else index
        self.device = None if device is None else torch.device(device)
        self.num_threads, self.depth = num_threads, depth

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]

    def __iter__(self) -> Generator[tuple[Any, Fetched], None, None]:
        under_way: deque[tuple[Callable[[], Any], _Fetch]] = deque()
        error: Exception | None = None
        with closing(self._sampled()) as batches:
            while error is None:
                try:
                    batch = next(batches, None)
                    if batch is None:
                        break
                    under_way.append((batch, self._fetch(batch())))
                except Exception as failed:  # raised below, in its batch's place
                    error = failed
                if len(under_way) > 1:
                    yield _arrived(*under_way.popleft())
            while under_way:
                yield _arrived(*under_way.popleft())
        if error is not None:
            raise error

    def _sampled(self) -> Generator[Callable[[], Any], None, None]:
        """What gives each batch to the stream that is current then, as often as it is called."""
        if self.sample is None:
            for item in self.items:
                yield partial(_itself, item)
            return
        items, sample, delivery = self.items, self.sample, self._delivery()
        if delivery is not None:
            items, sample = delivery.drawn(items), partial(delivery.run, sample)
        take = _itself if delivery is None else delivery.take
        with closing(
            pipelined(items, sample, num_threads=self.num_threads, depth=self.depth)
        ) as batches:
            for batch in batches:
                yield partial(take, batch)

    def _delivery(self) -> Delivery | None:
        """For threads whose samples may be on a GPU: that of the rows, or the current one."""
        of_rows = self.device is not None and self.device.type == "cuda"
        if self.num_threads and (of_rows or torch.cuda.is_initialized()):
            return Delivery(self.device if of_rows and self.device else torch.device("cuda"))
        return None

    def _fetch(self, batch: Any) -> _Fetch:
        index = self.index(batch)
        if isinstance(self.table, FeatureTable) and isinstance(index, Tensor):
            return self._prefetch(self.table, index)
        if isinstance(self.table, FeatureTable) or isinstance(index, Tensor):
            raise TypeError(
                "one table goes with an index tensor and tables by type with an index by type; "
                f"got a {type(self.table).__name__} and a {type(index).__name__}"
            )
        return {
            kind: self._prefetch(table, index[kind])
            for kind, table in self.table.items()
            if kind in index
        }

    def _prefetch(self, table: FeatureTable, index: Tensor) -> Prefetch:
        if self.device is not None:
            index = index.to(self.device, non_blocking=True)
        return table.prefetch(index)


_Fetch: TypeAlias = Prefetch | dict[str, Prefetch]


def _itself(batch: Any) -> Any:
    return batch


def _arrived(batch: Callable[[], Any], fetch: _Fetch) -> tuple[Any, Fetched]:
    if isinstance(fetch, Prefetch):
        return batch(), fetch.wait()
    return batch(), {kind: prefetch.wait() for kind, prefetch in fetch.items()}


def node_ids(batch: Any) -> Index:
    """`batch.n_id`, or by type where the batch keeps it so, or the batch itself when a tensor.

    Raises:
        TypeError: the batch is none of these.
    """
    if isinstance(batch, Tensor):
        return batch
    by_type = getattr(batch, "n_id_dict", None)  # PyG's HeteroData collects attributes by type
    ids = by_type if by_type is not None else getattr(batch, "n_id", None)
    if not isinstance(ids, Tensor | Mapping):
        raise TypeError(
            f"a {type(batch).__name__} has no n_id: pass index=, which says the rows it needs"
        )
    return ids
