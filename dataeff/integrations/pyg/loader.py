"""Drop-in loaders for PyG: its arguments and its batches, sampled and gathered by dataeff."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch_geometric.loader as pyg_loader
from torch_geometric.data import Data, HeteroData

from dataeff._flags import checked_bool
from dataeff.features.pipeline import pipelined
from dataeff.integrations.pyg.delivery import Delivery
from dataeff.integrations.pyg.graph import (
    has_row_per_node,
    is_table,
    node_counts,
    with_node_counts,
)
from dataeff.integrations.pyg.sampler import PyGNeighborSampler

_REFUSED = {
    "worker_init_fn": "there are no worker processes to initialise",
    "multiprocessing_context": "there are no worker processes",
    "timeout": "an error in a thread reaches you by itself",
}


class _PipelinedLoader:
    """What both loaders add to PyG's: threads that work ahead, and rows out of tables."""

    def _thread_options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Takes out of `kwargs` what concerns threads; the rest is for PyG's loader."""
        for name, reason in _REFUSED.items():
            if kwargs.pop(name, None):
                raise NotImplementedError(
                    f"{name} is not supported: this loader works in threads, so {reason}"
                )
        kwargs.pop("persistent_workers", None)  # a thread costs nothing to start again
        num_threads = kwargs.pop("num_workers", 0)
        per_thread = kwargs.pop("prefetch_factor", None) or 2
        if num_threads < 0 or per_thread < 1:
            raise ValueError(
                f"num_workers={num_threads} must not be negative, and prefetch_factor={per_thread} "
                "must be at least 1"
            )
        self._num_threads, self._depth = num_threads, max(num_threads, 1) * per_thread
        return kwargs

    def _work(self, task: tuple[Any, int]) -> Any:
        index, seed = task
        share = max(1, torch.get_num_threads() // max(self._num_threads, 1))
        self._sampler.prepare(seed, share)
        return self.collate_fn(index)  # type: ignore[attr-defined]

    def _tasks(self) -> Iterator[tuple[Any, int]]:
        generator = self.generator  # type: ignore[attr-defined]
        device = "cpu" if generator is None else generator.device
        base = int(torch.empty((), dtype=torch.int64, device=device).random_(generator=generator))
        for i, index in enumerate(self._index_sampler):  # type: ignore[attr-defined]
            yield index, base + i

    def __iter__(self) -> Iterator[Any]:
        threads = {"num_threads": self._num_threads, "depth": self._depth}
        if not self.filter_per_worker:  # type: ignore[attr-defined]
            for drawn in pipelined(self._tasks(), self._work, **threads):
                yield self.filter_fn(drawn)  # type: ignore[attr-defined]
        elif self._num_threads and self.device is not None and self.device.type == "cuda":
            delivery = Delivery(self.device)
            work = partial(delivery.run, self._work)
            with closing(pipelined(self._tasks(), work, **threads)) as batches:
                for delivered in batches:
                    yield delivery.take(delivered)
        else:
            yield from pipelined(self._tasks(), self._work, **threads)

    @property
    def _sampler(self) -> PyGNeighborSampler:
        raise NotImplementedError

    def _finish(self, batch: Any) -> Any:
        """Takes rows out of tables, brings the batch to its device, calls the user's transform."""
        homogeneous = isinstance(batch, Data)
        if not isinstance(self.data, (Data, HeteroData)):  # type: ignore[attr-defined]
            self._take_edge_features(batch)
        for store in batch.stores:
            for key, value in list(store.items()):
                if is_table(value):
                    ids = self._rows_of(store, key, len(value), homogeneous)
                    store[key] = value.gather(ids if self.device is None else ids.to(self.device))
        if self.device is not None:
            batch = batch.to(self.device, non_blocking=True)
        elif self.pin_memory and torch.cuda.is_available():  # type: ignore[attr-defined]
            batch = batch.pin_memory()
        return batch if self._user_transform is None else self._user_transform(batch)

    def _take_edge_features(self, batch: Any) -> None:
        """Edge attributes of stores, which PyG's own loaders leave out or read by node."""
        features, counts = self.data[0], node_counts(self.data)  # type: ignore[attr-defined]
        for attr in features.get_all_tensor_attrs():
            group, name = attr.group_name, attr.attr_name
            if isinstance(counts, int):
                by_edge, edges = features.get_tensor_size(attr)[0] != counts, batch
            else:
                by_edge = isinstance(group, tuple) and group in batch.edge_types
                edges = batch[group] if by_edge else None
            if by_edge and "e_id" in edges:
                edges[name] = features.get_tensor(group, name, edges.e_id)

    def _rows_of(self, store: Any, key: str, num_rows: int, homogeneous: bool) -> torch.Tensor:
        """The ids that a table's rows are asked for: nodes or edges."""
        by_node = "n_id" in store
        if homogeneous:
            by_node = has_row_per_node(key, num_rows, self.data)  # type: ignore[attr-defined]
        ids: torch.Tensor = store.n_id if by_node else store.e_id
        return ids

    def enable_multithreading(self, worker_threads: int | None = None) -> Any:
        """Not supported: the threads of a sample are torch's, shared out among `num_workers`."""
        raise NotImplementedError("use torch.set_num_threads: this loader works in threads")

    def enable_cpu_affinity(self, loader_cores: Any = None) -> Any:
        """Not supported: threads of one process run where the process may (`taskset`)."""
        raise NotImplementedError("use taskset or numactl: this loader works in threads")

    device: torch.device | None
    _user_transform: Any


def _named_seeds(data: Any, input_nodes: Any) -> Any:
    """`input_nodes` as PyG takes it.

    Raises:
        TypeError: seeds of a graph without types that name one.
        ValueError: seeds of a typed graph that do not name their type; a mask of another length.
    """
    if isinstance(data, Data):
        _refuse_type("input_nodes", input_nodes)
        _check_mask(input_nodes, data.num_nodes)
        return input_nodes
    counts = node_counts(data)
    if isinstance(counts, int):
        _refuse_type("input_nodes", input_nodes)
        _check_mask(input_nodes, counts)
        return torch.arange(counts, device="cpu") if input_nodes is None else input_nodes
    named = isinstance(input_nodes, (tuple, list)) and len(input_nodes) == 2
    name, ids = input_nodes if named else (input_nodes, None)
    if not isinstance(name, str) or name not in counts:
        raise ValueError(
            f"input_nodes must name a node type of the graph, one of {list(counts)}, alone or "
            f"with ids or a mask, as in ({next(iter(counts))!r}, mask); got {name!r}"
        )
    _check_mask(ids, counts[name])
    return name if ids is None else input_nodes


def _refuse_type(argument: str, seeds: Any) -> None:
    """TypeError where the seeds of a graph without types come with a type, or by type."""
    named = isinstance(seeds, (tuple, list)) and any(
        part is None or isinstance(part, (str, tuple, Mapping)) for part in seeds
    )
    if named or isinstance(seeds, (str, Mapping)):
        raise TypeError(
            f"this graph has no types, and {argument} names one: give the seeds alone; got "
            f"{seeds!r}"
        )


def _check_mask(ids: Any, num_nodes: int | None) -> None:
    if isinstance(ids, torch.Tensor) and ids.dtype == torch.bool and ids.shape != (num_nodes,):
        raise ValueError(
            f"a mask of input_nodes has an element for each of the {num_nodes} nodes, got one of"
            f" shape {list(ids.shape)}"
        )


def _check_link_type(data: Any, edge_label_index: Any) -> None:
    """ValueError unless the edges of a typed graph name their type, TypeError if others' do."""
    if isinstance(data, Data):
        _refuse_type("edge_label_index", edge_label_index)
        return
    stores = not isinstance(data, HeteroData)
    types = [e.edge_type for e in data[1].get_all_edge_attrs()] if stores else data.edge_types
    name = edge_label_index
    if isinstance(name, (tuple, list)) and len(name) == 2 and not isinstance(name[0], str):
        name = name[0]
    if isinstance(name, (tuple, list)):
        name = tuple(name) if stores else data._to_canonical(*name)
    # Stores without types have the one type None, which does not do alone.
    if isinstance(name, torch.Tensor) or edge_label_index is None or name not in types:
        raise ValueError(
            f"edge_label_index must name an edge type of the graph, one of {types}, alone or with "
            f"edges, as in ({types[0]}, edge_index); got {name!r}"
        )


def _check_one_for_each(seeds: str, num_seeds: int, **values: torch.Tensor | None) -> None:
    """ValueError unless there are as many of each as seeds: others would go to wrong ones."""
    for name, value in values.items():
        if value is not None and len(value) != num_seeds:
            raise ValueError(f"{name} has {len(value)} values for {num_seeds} {seeds}")


def _make_sampler(
    data: Any, neighbor_sampler: Any, directed: bool, **options: Any
) -> PyGNeighborSampler:
    if not checked_bool("directed", directed):
        options["subgraph_type"] = "induced"
    if neighbor_sampler is None:
        return PyGNeighborSampler(data, **options)
    if not isinstance(neighbor_sampler, PyGNeighborSampler):
        raise TypeError(
            f"neighbor_sampler is a {type(neighbor_sampler).__name__}, not a PyGNeighborSampler: "
            "for another sampler use PyG's own loader"
        )
    return neighbor_sampler


class NeighborLoader(_PipelinedLoader, pyg_loader.NeighborLoader):  # type: ignore[misc]
    """`torch_geometric.loader.NeighborLoader` without pyg-lib or torch-sparse.

    Arguments and batches are PyG's (GraphSAGE, arXiv 1706.02216). What differs:

    - `num_workers` counts threads, not processes (the core releases Python's lock), so nothing is
      copied, forked or pickled; `prefetch_factor` batches per thread are prepared ahead (2).
      Batches do not depend on either: `torch.manual_seed`, or `generator`, fixes a run.
    - Edge attributes of stores come with each batch, too.
    - An attribute of `data` may be a `dataeff.FeatureTable`: its rows are gathered for each batch,
      on `device` when that is given. On a GPU the threads do so, and run `transform`, on a stream
      of their own beside the caller's.
    - `filter_per_worker=False` gathers features in the caller's thread, not in those ahead.
    - `is_sorted` is not needed: sorted edges are recognised.

    Args:
        data: a `Data`, a `HeteroData`, or a (FeatureStore, GraphStore) pair.
        num_neighbors: edges to take per hop, for all edge types or for each; -1 takes all.
        input_nodes: seeds: ids, a mask, or (node type, ids or mask); all nodes by default.
        input_time: latest time of the edges around each seed.
        replace: sample with replacement.
        subgraph_type: `directional`, `bidirectional` or `induced`.
        disjoint: a tree of its own for each seed, numbered in `batch`.
        temporal_strategy: `uniform` or `last`.
        time_attr: attribute of nodes or edges that holds their time.
        weight_attr: attribute of edges that holds the odds of taking them.
        transform: called with each batch.
        transform_sampler_output: called with each sampler output.
        is_sorted: accepted for compatibility.
        filter_per_worker: False gathers features in the caller's thread.
        neighbor_sampler: a `PyGNeighborSampler` to share between loaders.
        directed: False is PyG's older form of `subgraph_type="induced"`.
        device: where batches are delivered; by default where `data` is.
        **kwargs: those of `torch.utils.data.DataLoader`, such as `batch_size` or `shuffle`.

    Raises:
        NotImplementedError: an option that has no meaning or no implementation here.
        ValueError: options contradict one another or the data.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: Sequence[int] | Mapping[Any, Sequence[int]],
        input_nodes: Any = None,
        input_time: torch.Tensor | None = None,
        replace: bool = False,
        subgraph_type: Any = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
        time_attr: str | None = None,
        weight_attr: str | None = None,
        transform: Any = None,
        transform_sampler_output: Any = None,
        is_sorted: bool = False,
        filter_per_worker: bool | None = None,
        neighbor_sampler: PyGNeighborSampler | None = None,
        directed: bool = True,
        *,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = self._thread_options(kwargs)
        data = with_node_counts(data)
        self._user_transform = transform
        self.device = None if device is None else torch.device(device)
        super().__init__(
            data,
            num_neighbors,
            input_nodes=_named_seeds(data, input_nodes),
            input_time=input_time,
            time_attr=time_attr,
            transform=self._finish,
            transform_sampler_output=transform_sampler_output,
            filter_per_worker=filter_per_worker,
            neighbor_sampler=_make_sampler(
                data,
                neighbor_sampler,
                directed,
                num_neighbors=num_neighbors,
                replace=replace,
                subgraph_type=subgraph_type,
                disjoint=disjoint,
                temporal_strategy=temporal_strategy,
                time_attr=time_attr,
                weight_attr=weight_attr,
            ),
            **kwargs,
        )
        _check_one_for_each("input_nodes", len(self.input_data.node), input_time=input_time)

    @property
    def _sampler(self) -> PyGNeighborSampler:
        sampler: PyGNeighborSampler = self.node_sampler
        return sampler


class LinkNeighborLoader(_PipelinedLoader, pyg_loader.LinkNeighborLoader):  # type: ignore[misc]
    """`torch_geometric.loader.LinkNeighborLoader` without pyg-lib or torch-sparse.

    The neighbourhoods of both ends of each edge of `edge_label_index`, with negative samples on
    request. What differs from PyG is what differs for `NeighborLoader`; negative samples, too, are
    the same for any number of threads.

    Args:
        data: as for `NeighborLoader`.
        num_neighbors: as for `NeighborLoader`.
        edge_label_index: the edges to start from, [2, num_edges], an edge type, or both as a pair.
        edge_label: label of each of these edges.
        edge_label_time: latest time of the edges around each of these edges.
        replace: as for `NeighborLoader`.
        subgraph_type: as for `NeighborLoader`.
        disjoint: as for `NeighborLoader`.
        temporal_strategy: as for `NeighborLoader`.
        neg_sampling: a `torch_geometric.sampler.NegativeSampling`, or what it casts from.
        neg_sampling_ratio: PyG's older form of `neg_sampling`.
        time_attr: as for `NeighborLoader`.
        weight_attr: as for `NeighborLoader`.
        transform: as for `NeighborLoader`.
        transform_sampler_output: as for `NeighborLoader`.
        is_sorted: accepted for compatibility.
        filter_per_worker: as for `NeighborLoader`.
        neighbor_sampler: as for `NeighborLoader`.
        directed: False is PyG's older form of `subgraph_type="induced"`.
        device: as for `NeighborLoader`.
        **kwargs: those of `torch.utils.data.DataLoader`.

    Raises:
        NotImplementedError: an option that has no meaning or no implementation here.
        ValueError: options contradict one another or the data.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: Sequence[int] | Mapping[Any, Sequence[int]],
        edge_label_index: Any = None,
        edge_label: torch.Tensor | None = None,
        edge_label_time: torch.Tensor | None = None,
        replace: bool = False,
        subgraph_type: Any = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
        neg_sampling: Any = None,
        neg_sampling_ratio: float | None = None,
        time_attr: str | None = None,
        weight_attr: str | None = None,
        transform: Any = None,
        transform_sampler_output: Any = None,
        is_sorted: bool = False,
        filter_per_worker: bool | None = None,
        neighbor_sampler: PyGNeighborSampler | None = None,
        directed: bool = True,
        *,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = self._thread_options(kwargs)
        _check_link_type(data, edge_label_index)
        data = with_node_counts(data)
        self._user_transform = transform
        self.device = None if device is None else torch.device(device)
        super().__init__(
            data,
            num_neighbors,
            edge_label_index=edge_label_index,
            edge_label=edge_label,
            edge_label_time=edge_label_time,
            neg_sampling=neg_sampling,
            neg_sampling_ratio=neg_sampling_ratio,
            time_attr=time_attr,
            transform=self._finish,
            transform_sampler_output=transform_sampler_output,
            filter_per_worker=filter_per_worker,
            neighbor_sampler=_make_sampler(
                data,
                neighbor_sampler,
                directed,
                num_neighbors=num_neighbors,
                replace=replace,
                subgraph_type=subgraph_type,
                disjoint=disjoint,
                temporal_strategy=temporal_strategy,
                time_attr=time_attr,
                weight_attr=weight_attr,
            ),
            **kwargs,
        )
        _check_one_for_each(
            "edges of edge_label_index",
            len(self.input_data.row),
            edge_label=edge_label,
            edge_label_time=edge_label_time,
        )

    @property
    def _sampler(self) -> PyGNeighborSampler:
        sampler: PyGNeighborSampler = self.link_sampler
        return sampler
