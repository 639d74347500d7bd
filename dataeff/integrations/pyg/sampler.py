"""dataeff's samplers behind PyG's sampler interface."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    HeteroSamplerOutput,
    NegativeSampling,
    NodeSamplerInput,
    NumNeighbors,
    SamplerOutput,
)
from torch_geometric.sampler.base import SubgraphType
from torch_geometric.sampler.neighbor_sampler import edge_sample, node_sample

from dataeff.integrations.pyg.graph import (
    hetero_graphs,
    homogeneous_graph,
    is_homogeneous,
    node_counts,
    times_of,
)
from dataeff.sampling import HeteroNeighborSampler, NeighborSampler

_LARGEST_SEED = 2**63 - 1
_NO_TIMES = "{} have no times of their own: give the loader input_time, one time for each seed"


def _of_one_type(num_neighbors: NumNeighbors) -> Sequence[int]:
    """The fan-outs of edges without a type: of a dict that names none, the default."""
    default: Sequence[int] | None = num_neighbors.default
    values: Any = num_neighbors.values  # what the caller gave: a list, or a dict of some types
    return values if default is None or values != {} else default


class PyGNeighborSampler(BaseSampler):  # type: ignore[misc]
    """Samples for PyG's loaders with dataeff's core; neither pyg-lib nor torch-sparse is needed.

    Arguments are those of `torch_geometric.sampler.NeighborSampler`. Edge ids are those of the
    original `edge_index`. Every call draws its random seed from torch's default generator, unless
    the calling thread has set one with `prepare`.

    Raises:
        ValueError: an attribute is missing, or the options contradict one another.
    """

    def __init__(
        self,
        data: Any,
        num_neighbors: NumNeighbors | Sequence[int] | Mapping[Any, Sequence[int]],
        *,
        replace: bool = False,
        subgraph_type: SubgraphType | str = "directional",
        disjoint: bool = False,
        temporal_strategy: str = "uniform",
        time_attr: str | None = None,
        weight_attr: str | None = None,
    ) -> None:
        self.subgraph_type = SubgraphType(subgraph_type)
        if temporal_strategy not in ("uniform", "last"):
            raise ValueError(
                f"temporal_strategy is {temporal_strategy!r}, neither 'uniform' nor 'last'"
            )
        # One of PyG's is given anew: it keeps what it says of the first graph it is asked about.
        self.num_neighbors = (
            NumNeighbors(num_neighbors.values, num_neighbors.default)
            if isinstance(num_neighbors, NumNeighbors)
            else NumNeighbors(num_neighbors)
        )
        # As PyG's functions take them: of one node set its times alone.
        by_type, _ = times_of(data, time_attr)
        self.node_time = by_type.get(None) if is_homogeneous(data) else (by_type or None)
        self.num_nodes = node_counts(data)
        options: dict[str, Any] = {
            "replace": replace,
            "disjoint": disjoint,
            "last": temporal_strategy == "last" and time_attr is not None,
            "induced": self.subgraph_type == SubgraphType.induced,
        }
        self.sampler: NeighborSampler | HeteroNeighborSampler
        if is_homogeneous(data):
            graph = homogeneous_graph(data, time_attr, weight_attr)
            self.sampler = NeighborSampler(graph, _of_one_type(self.num_neighbors), **options)
        else:
            graphs = hetero_graphs(data, time_attr, weight_attr)
            fanouts = self.num_neighbors.get_values(list(graphs))
            assert isinstance(self.num_nodes, dict)
            self.sampler = HeteroNeighborSampler(
                graphs, fanouts, num_nodes=self.num_nodes, **options
            )
        self._own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own = threading.local()

    def prepare(self, seed: int, device: torch.device | None = None) -> None:
        """Sets the random seed of the calling thread's next sample, and where it is drawn.

        By default that is where its seeds are; the sample is the same everywhere.
        """
        self._own.next = seed, device

    def _prepared(self) -> tuple[int, torch.device | None]:
        prepared: tuple[int, torch.device | None] | None = self._own.__dict__.pop("next", None)
        return prepared or (int(torch.randint(_LARGEST_SEED, (), device="cpu")), None)

    @property
    def edge_permutation(self) -> None:
        """None: edge ids are those of the original graph already."""
        return None

    @property
    def disjoint(self) -> bool:
        """Whether every seed has a tree of its own."""
        return self.sampler.disjoint

    def sample_from_nodes(self, inputs: NodeSamplerInput) -> SamplerOutput | HeteroSamplerOutput:
        """Samples the neighbourhood of nodes."""
        return self._directed(node_sample(inputs, self._sample))

    def sample_from_edges(
        self, inputs: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """Samples the neighbourhoods of both ends of edges, and of negative samples."""
        random_seed, device = self._prepared()
        self.prepare(random_seed, device)
        if neg_sampling is not None:
            neg_sampling = _SeededNegativeSampling(neg_sampling, random_seed)
        drawn = edge_sample(
            inputs, self._sample, self.num_nodes, self.disjoint, self.node_time, neg_sampling
        )
        return self._directed(drawn)

    def samples_on(self, device: torch.device) -> bool:
        """Whether kernels of the GPU can read the graph, which is registered for them.

        Warns, with the reason, where they cannot.
        """
        try:
            self.sampler.on_device(torch.empty(0, device=device).device)
        except RuntimeError as error:
            warnings.warn(
                f"seeds on {device} are sampled on the host, since the graph cannot be read from "
                f"there: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True

    def _directed(
        self, drawn: SamplerOutput | HeteroSamplerOutput
    ) -> SamplerOutput | HeteroSamplerOutput:
        if self.subgraph_type == SubgraphType.bidirectional:
            return drawn.to_bidirectional()
        return drawn

    def _sample(self, seed: Any, seed_time: Any = None) -> SamplerOutput | HeteroSamplerOutput:
        if isinstance(self.sampler, NeighborSampler):
            return self._sample_homogeneous(self.sampler, seed, seed_time)
        return self._sample_hetero(self.sampler, seed, seed_time)

    def _sample_homogeneous(
        self, sampler: NeighborSampler, seed: Tensor, seed_time: Tensor | None
    ) -> SamplerOutput:
        if seed_time is None and isinstance(self.node_time, Tensor):
            seed_time = self.node_time[seed.to(self.node_time.device)]
        if seed_time is None and sampler.graph.edge_time is not None:
            raise ValueError(_NO_TIMES.format("seeds"))
        random_seed, device = self._prepared()
        drawn = sampler.sample(seed.to(device), seed=random_seed, seed_time=seed_time)
        return SamplerOutput(
            node=drawn.n_id,
            row=drawn.edge_index[0],
            col=drawn.edge_index[1],
            edge=drawn.e_id,
            batch=drawn.batch,
            # PyG trims layers by these numbers, which an induced graph does not allow.
            num_sampled_nodes=None if sampler.induced else drawn.num_sampled_nodes,
            num_sampled_edges=None if sampler.induced else drawn.num_sampled_edges,
        )

    def _sample_hetero(
        self,
        sampler: HeteroNeighborSampler,
        seed: dict[str, Tensor],
        seed_time: dict[str, Tensor] | None,
    ) -> HeteroSamplerOutput:
        if seed_time is None and sampler.temporal:
            times = self.node_time if isinstance(self.node_time, Mapping) else {}
            if lacking := sorted(set(seed) - set(times)):
                raise ValueError(_NO_TIMES.format(f"seeds of type {lacking[0]!r}"))
            seed_time = {key: times[key][ids.to(times[key].device)] for key, ids in seed.items()}
        random_seed, device = self._prepared()
        seed = {key: ids.to(device) for key, ids in seed.items()}
        drawn = sampler.sample(seed, seed=random_seed, seed_time=seed_time)
        return HeteroSamplerOutput(
            node=drawn.n_id,
            row={key: edge_index[0] for key, edge_index in drawn.edge_index.items()},
            col={key: edge_index[1] for key, edge_index in drawn.edge_index.items()},
            edge=drawn.e_id,
            batch=drawn.batch,
            # PyG trims layers by these numbers, which an induced graph does not allow.
            num_sampled_nodes=None if sampler.induced else drawn.num_sampled_nodes,
            num_sampled_edges=None if sampler.induced else drawn.num_sampled_edges,
        )


class _SeededNegativeSampling(NegativeSampling):  # type: ignore[misc]
    """Draws from a generator of its own: in threads, torch's default one has no fixed order."""

    def __init__(self, config: NegativeSampling, seed: int) -> None:
        self.__dict__.update(config.__dict__)
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def sample(self, num_samples: int, endpoint: str, num_nodes: int | None = None) -> Tensor:
        weight = self.src_weight if endpoint == "src" else self.dst_weight
        if weight is not None and num_nodes is not None and weight.numel() != num_nodes:
            raise ValueError(
                f"the negative samples' weights are {weight.numel()} for {num_nodes} nodes"
            )
        if weight is not None:
            return torch.multinomial(
                weight, num_samples, replacement=True, generator=self._generator
            )
        if num_nodes is None:
            raise ValueError("negative sampling without weights needs the number of nodes")
        return torch.randint(num_nodes, (num_samples,), generator=self._generator, device="cpu")
