"""The seeds of a loader as PyG takes them; others are refused, with what helps, before it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch_geometric.data import Data, HeteroData

from dataeff.integrations.pyg.graph import node_counts


def named_seeds(data: Any, input_nodes: Any) -> Any:
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


def check_link_type(data: Any, edge_label_index: Any) -> None:
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


def check_one_for_each(seeds: str, num_seeds: int, **values: torch.Tensor | None) -> None:
    """ValueError unless there are as many of each as seeds: others would go to wrong ones."""
    for name, value in values.items():
        if value is not None and len(value) != num_seeds:
            raise ValueError(f"{name} has {len(value)} values for {num_seeds} {seeds}")
