"""Drop-in loaders for PyG: its arguments and its batches, sampled and gathered by dataeff."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_geometric.loader as pyg_loader

from dataeff.integrations.pyg.graph import with_node_counts
from dataeff.integrations.pyg.pipelined_loader import PipelinedLoader
from dataeff.integrations.pyg.sampler import PyGNeighborSampler
from dataeff.integrations.pyg.seeds import (
    check_one_for_each,
    check_tensors,
    named_edges,
    named_seeds,
)


class NeighborLoader(PipelinedLoader, pyg_loader.NeighborLoader):  # type: ignore[misc]
    """`torch_geometric.loader.NeighborLoader` without pyg-lib or torch-sparse.

    Arguments and batches are PyG's (GraphSAGE, arXiv 1706.02216). What differs:

    - `num_workers` counts threads, not processes (the core releases Python's lock), so nothing is
      copied, forked or pickled; `prefetch_factor` batches per thread are prepared ahead (2).
      Batches do not depend on either: `torch.manual_seed`, or `generator`, fixes a run. Where
      there is no GPU, operators of torch run on each thread alone, as in PyG's workers.
    - `worker_init_fn` runs once in each thread of an `iter()`, one after another, before the first
      batch; `get_worker_info()` is right in it, and None in `transform`. Seeds that it sets are
      undone: threads share the process's random generators.
    - `timeout` bounds the wait for a batch. Python cannot end a thread: the one that is late goes
      on by itself, and the process waits for it at its end.
    - There is no `multiprocessing_context`, and `persistent_workers` has no effect.
    - Edge attributes of stores come with each batch, too.
    - An attribute of `data` may be a `dataeff.FeatureTable`: its rows are gathered for each batch,
      on `device` when that is given. On a GPU the threads do so, and run `transform`, on a stream
      of their own beside the caller's.
    - Seeds that are given on a GPU are sampled on the GPU of `device` (theirs, the current one, by
      default), by kernels that read the graph in host memory; the samples are those of the host.
      Others are sampled on the host, as are those of stores, and of graphs that CUDA cannot
      register.
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
        device: where batches are delivered; by default where `data` is, or the seeds on a GPU.
        **kwargs: those of `torch.utils.data.DataLoader`, such as `batch_size` or `shuffle`.

    Raises:
        NotImplementedError: an option that has no meaning or no implementation here.
        TypeError: `data`, or what names its seeds, is of another kind.
        ValueError: options contradict one another or the data.
        RuntimeError: by iteration, a batch did not come within `timeout`.
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
        given = locals()  # all of the arguments, for what both loaders do with them
        data = with_node_counts(data)
        seeds = named_seeds(data, input_nodes)
        check_tensors(input_time=input_time)
        shared = self._begin(data, given)
        super().__init__(**shared, input_nodes=seeds, input_time=input_time)
        check_one_for_each("input_nodes", len(self.input_data.node), input_time=input_time)

    @property
    def _sampler(self) -> PyGNeighborSampler:
        sampler: PyGNeighborSampler = self.node_sampler
        return sampler


class LinkNeighborLoader(PipelinedLoader, pyg_loader.LinkNeighborLoader):  # type: ignore[misc]
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
        TypeError: `data`, or what names its seeds, is of another kind.
        ValueError: options contradict one another or the data.
        RuntimeError: by iteration, a batch did not come within `timeout`.
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
        given = locals()  # all of the arguments, for what both loaders do with them
        data = with_node_counts(data)
        edges = named_edges(data, edge_label_index)
        check_tensors(edge_label=edge_label, edge_label_time=edge_label_time)
        shared = self._begin(data, given)
        super().__init__(
            **shared,
            edge_label_index=edges,
            edge_label=edge_label,
            edge_label_time=edge_label_time,
            neg_sampling=neg_sampling,
            neg_sampling_ratio=neg_sampling_ratio,
        )
        check_one_for_each(
            "edges of edge_label_index",
            len(self.input_data.row),
            edge_label=edge_label,
            edge_label_time=edge_label_time,
            input_id=kwargs.get("input_id"),
        )

    @property
    def _sampler(self) -> PyGNeighborSampler:
        sampler: PyGNeighborSampler = self.link_sampler
        return sampler
