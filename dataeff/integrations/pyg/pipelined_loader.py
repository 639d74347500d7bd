"""What dataeff's loaders add to PyG's: threads that work ahead, and rows out of tables."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch_geometric.data import Data, HeteroData

from dataeff._flags import checked_bool
from dataeff._integers import checked_int
from dataeff.features.delivery import Delivery
from dataeff.features.pipeline import pipelined
from dataeff.integrations.pyg.graph import RowTable, has_row_per_node, is_table, node_counts
from dataeff.integrations.pyg.sampler import PyGNeighborSampler
from dataeff.integrations.pyg.seeds import on_gpu
from dataeff.integrations.pyg.worker_start import WorkerStart

_SAMPLER_OPTIONS = (
    *("num_neighbors", "replace", "subgraph_type", "disjoint"),
    *("temporal_strategy", "time_attr", "weight_attr"),
)


class PipelinedLoader:
    """What both loaders add to PyG's: threads that work ahead, and rows out of tables."""

    device: torch.device | None
    _sampled_on: torch.device | None
    _user_transform: Any
    _user_output_transform: Any

    def _begin(self, data: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """What PyG's loader is given beside the seeds.

        Args:
            data: as the loader was given it, its numbers of nodes told.
            given: the loader's arguments by name, `kwargs` among them.
        """
        self.device = None if given["device"] is None else torch.device(given["device"])
        self._user_transform = given["transform"]
        self._user_output_transform = given["transform_sampler_output"]
        if given["filter_per_worker"] is not None:
            checked_bool("filter_per_worker", given["filter_per_worker"])
        sampler = _make_sampler(data, given)
        self._sampled_on = self._where_sampled(data, sampler, given)
        return {
            "data": data,
            "neighbor_sampler": sampler,
            **{name: given[name] for name in ("num_neighbors", "time_attr", "filter_per_worker")},
            **self._thread_options(given["kwargs"]),
        }

    def _where_sampled(
        self, data: Any, sampler: PyGNeighborSampler, given: Mapping[str, Any]
    ) -> torch.device | None:
        """The GPU of the batches, where the seeds were given on one; None: the host."""
        seeds = given.get("input_nodes", given.get("edge_label_index"))
        if not on_gpu(seeds):
            return None
        if self.device is None:
            self.device = torch.device("cuda")
        # Features of stores are asked for by the host.
        there = self.device.type == "cuda" and isinstance(data, (Data, HeteroData))
        return self.device if there and sampler.samples_on(self.device) else None

    def _thread_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Takes out of `kwargs` what concerns threads; the rest is for PyG's loader."""
        num_threads = checked_int("num_workers", kwargs.pop("num_workers", 0), least=0)
        if kwargs.pop("multiprocessing_context", None) and num_threads:
            raise NotImplementedError(
                "multiprocessing_context is not supported: this loader works in threads, so there "
                "are no worker processes to start"
            )
        init = kwargs.get("worker_init_fn")
        if not (init is None or callable(init)):
            raise TypeError(f"worker_init_fn={init!r} is not to be called: def f(worker_id): ...")
        _check_timeout(kwargs.get("timeout", 0))
        kwargs.pop("persistent_workers", None)  # a thread costs nothing to start again
        per_thread = checked_int(
            "prefetch_factor", kwargs.pop("prefetch_factor", None) or 2, least=1
        )
        self._num_threads, self._depth = num_threads, max(num_threads, 1) * per_thread
        return kwargs

    def _work(self, task: tuple[Any, int]) -> Any:
        index, seed = task
        self._sampler.prepare(seed, self._sampled_on)
        return self.collate_fn(index)  # type: ignore[attr-defined]

    def _base_seed(self) -> int:
        generator = self.generator  # type: ignore[attr-defined]
        device = "cpu" if generator is None else generator.device
        return int(torch.empty((), dtype=torch.int64, device=device).random_(generator=generator))

    def _tasks(self, base: int) -> Iterator[tuple[Any, int]]:
        for i, index in enumerate(self._index_sampler):  # type: ignore[attr-defined]
            yield index, base + i

    def _pipelined(self, work: Callable[[tuple[Any, int]], Any]) -> Generator[Any, None, None]:
        base, begin = self._base_seed(), None
        if self.worker_init_fn is not None and self._num_threads:  # type: ignore[attr-defined]
            begin = WorkerStart(self.worker_init_fn, self._num_threads, base, self.dataset)  # type: ignore[attr-defined]
        yield from pipelined(
            self._tasks(base),
            work,
            num_threads=self._num_threads,
            depth=self._depth,
            begin=begin,
            timeout_s=self.timeout or None,  # type: ignore[attr-defined]
        )

    def __iter__(self) -> Iterator[Any]:
        finish = _itself if self.filter_per_worker else self.filter_fn  # type: ignore[attr-defined]
        there = self.device is not None and self.device.type == "cuda"
        if not (self._num_threads and there and (finish is _itself or self._sampled_on)):
            for batch in self._pipelined(self._work):
                yield finish(batch)
            return
        assert self.device is not None
        delivery = Delivery(self.device)
        with closing(self._pipelined(partial(delivery.run, self._work))) as batches:
            for delivered in batches:
                yield finish(delivery.take(delivered))

    @property
    def _sampler(self) -> PyGNeighborSampler:
        raise NotImplementedError

    def filter_fn(self, out: Any) -> Any:
        """The batch of a sample: PyG's, with rows out of tables, on its device, transformed."""
        if self._user_output_transform is not None:
            out = self._user_output_transform(out)
        batch = super().filter_fn(out)  # type: ignore[misc]
        if not isinstance(self.data, (Data, HeteroData)):  # type: ignore[attr-defined]
            self._take_edge_features(batch, out)
        for store in batch.stores:
            for key, value in list(store.items()):
                if is_table(value):
                    store[key] = self._gathered(value, self._rows_of(out, store, key, len(value)))
        if self.device is not None:
            batch = batch.to(self.device, non_blocking=True)
        elif self.pin_memory and torch.cuda.is_available():  # type: ignore[attr-defined]
            batch = batch.pin_memory()
        return batch if self._user_transform is None else self._user_transform(batch)

    def _take_edge_features(self, batch: Any, drawn: Any) -> None:
        """Edge attributes of stores, which PyG's own loaders leave out or read by node."""
        features, counts = self.data[0], node_counts(self.data)  # type: ignore[attr-defined]
        for attr in features.get_all_tensor_attrs():
            group, name = attr.group_name, attr.attr_name
            if isinstance(counts, int):
                by_edge, edges = features.get_tensor_size(attr)[0] != counts, batch
            else:
                by_edge = isinstance(group, tuple) and group in batch.edge_types
                edges = batch[group] if by_edge else None
            ids = _edge_ids(drawn, group) if by_edge else None
            if ids is not None:
                edges[name] = features.get_tensor(group, name, ids)

    def _rows_of(self, drawn: Any, store: Any, key: str, num_rows: int) -> torch.Tensor | None:
        """The ids that a table's rows are asked for: nodes or edges; None: of edges without ids.

        The sample's own: `n_id` of a batch may be an attribute that the data came with.
        """
        by_type = store._key
        if by_type is None:
            by_node = has_row_per_node(key, num_rows, self.data)  # type: ignore[attr-defined]
        else:
            by_node = isinstance(by_type, str)
        if not by_node:
            return _edge_ids(drawn, by_type)
        ids: torch.Tensor = drawn.node if by_type is None else drawn.node[by_type]
        return ids

    def _gathered(self, table: RowTable, ids: torch.Tensor | None) -> torch.Tensor | None:
        if ids is None:  # as PyG does with tensors
            return None
        return table.gather(ids if self.device is None else ids.to(self.device))

    def enable_multithreading(self, worker_threads: int | None = None) -> Any:
        """Not supported: the threads of a sample are torch's, shared out among `num_workers`."""
        raise NotImplementedError("use torch.set_num_threads: this loader works in threads")

    def enable_cpu_affinity(self, loader_cores: Any = None) -> Any:
        """Not supported: threads of one process run where the process may (`taskset`)."""
        raise NotImplementedError("use taskset or numactl: this loader works in threads")


def _itself(batch: Any) -> Any:
    return batch


def _check_timeout(timeout: object) -> None:
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number:
        raise TypeError(f"timeout={timeout!r} is no number of seconds; 0 waits for ever")
    if not 0 <= timeout <= threading.TIMEOUT_MAX:  # type: ignore[operator]
        raise ValueError(f"timeout={timeout!r} is no time to wait, in seconds; 0 waits for ever")


def _edge_ids(drawn: Any, edge_type: Any) -> torch.Tensor | None:
    """The ids of a sample's edges; None where they have none (of several edges made one)."""
    ids = drawn.edge if edge_type is None else (drawn.edge or {}).get(edge_type)
    return ids if ids is None else ids.long()


def _make_sampler(data: Any, given: Mapping[str, Any]) -> PyGNeighborSampler:
    options = {name: given[name] for name in _SAMPLER_OPTIONS}
    if not checked_bool("directed", given["directed"]):
        options["subgraph_type"] = "induced"
    sampler = given["neighbor_sampler"]
    if sampler is None:
        return PyGNeighborSampler(data, **options)
    if not isinstance(sampler, PyGNeighborSampler):
        raise TypeError(
            f"neighbor_sampler is a {type(sampler).__name__}, not a PyGNeighborSampler: "
            "for another sampler use PyG's own loader"
        )
    return sampler
