"""The seeds of a loader as PyG takes them; others are refused, with what helps, before it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from dataeff.integrations.pyg.graph import node_counts


def on_gpu(seeds: Any) -> bool:
    """Whether seeds, or edges to start from, were given in a tensor on a GPU."""
    parts = seeds if isinstance(seeds, (tuple, list)) and len(seeds) == 2 else (seeds,)
    return any(isinstance(part, Tensor) and part.is_cuda for part in parts)


def named_seeds(data: Any, input_nodes: Any) -> Any:
    """`input_nodes` as PyG takes it, its ids or mask in a tensor.

    Raises:
        TypeError: seeds of a graph without types that name one; seeds that are no integers.
        ValueError: seeds of a typed graph that do not name their type, or of another shape.
    """
    counts = data.num_nodes if isinstance(data, Data) else node_counts(data)
    if not isinstance(counts, dict):
        _refuse_type("input_nodes", input_nodes)
        return (
            torch.arange(counts, device="cpu") if input_nodes is None else _ids(input_nodes, counts)
        )
    named = isinstance(input_nodes, (tuple, list)) and len(input_nodes) == 2
    name, ids = input_nodes if named else (input_nodes, None)
    if not isinstance(name, str) or name not in counts:
        raise ValueError(
            f"input_nodes must name a node type of the graph, one of {list(counts)}, alone or "
            f"with ids or a mask, as in ({next(iter(counts))!r}, mask); got {name!r}"
        )
    return name if ids is None else (name, _ids(ids, counts[name]))


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


def _ids(seeds: Any, num_nodes: int | None) -> Tensor:
    """Seeds as a tensor of ids or a mask, also those of a list or an array.

    PyG reads a list or an array of bools as the ids 0 and 1.
    """
    ids = _integers("input_nodes", seeds)
    if ids.dtype == torch.bool and ids.shape != (num_nodes,):
        raise ValueError(
            f"a mask of input_nodes has an element for each of the {num_nodes} nodes, got one of"
            f" shape {list(ids.shape)}"
        )
    if ids.dim() != 1:
        raise ValueError(f"input_nodes are ids or a mask, got a shape of {list(ids.shape)}")
    return ids


def _integers(argument: str, values: Any) -> Tensor:
    try:
        ids = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument} are ids in a tensor, an array or a list: {error}") from error
    if not isinstance(values, Tensor) and not ids.numel():
        return ids.long()  # of an empty list torch makes floats
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.uint8:
        raise TypeError(
            f"{argument} are integers or a mask, got {ids.dtype}: use .long() of ids, .bool() of a "
            "mask"
        )
    return ids if ids.dtype in (torch.bool, torch.int32) else ids.long()


def named_edges(data: Any, edge_label_index: Any) -> Any:
    """`edge_label_index` as PyG takes it, its ends in a tensor.

    Raises:
        TypeError: edges of a graph without types that name one; ends that are no integers.
        ValueError: edges of a typed graph that do not name their type; ends of another shape.
    """
    if isinstance(data, Data):
        _refuse_type("edge_label_index", edge_label_index)
        return None if edge_label_index is None else _ends(edge_label_index)
    stores = not isinstance(data, HeteroData)
    types = [e.edge_type for e in data[1].get_all_edge_attrs()] if stores else data.edge_types
    name, ends = edge_label_index, None
    if isinstance(name, (tuple, list)) and len(name) == 2 and not isinstance(name[0], str):
        name, ends = name
    if isinstance(name, (tuple, list)):
        name = tuple(name) if stores else data._to_canonical(*name)
    # Stores without types have the one type None, which does not do alone.
    if isinstance(name, Tensor) or edge_label_index is None or name not in types:
        raise ValueError(
            f"edge_label_index must name an edge type of the graph, one of {types}, alone or with "
            f"edges, as in ({types[0]}, edge_index); got {name!r}"
        )
    return edge_label_index if ends is None else (name, _ends(ends))


def _ends(edges: Any) -> Tensor:
    ends = _integers("edge_label_index", edges)
    if ends.dim() != 2 or len(ends) != 2 or ends.dtype == torch.bool:
        raise ValueError(
            f"edge_label_index is ids of shape [2, num_edges], got {ends.dtype} of shape "
            f"{list(ends.shape)}"
        )
    return ends


def check_tensors(**values: Any) -> None:
    """TypeError unless each is a tensor or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} is a tensor, got {type(value).__name__}: torch.as_tensor({name})"
            )


def check_one_for_each(seeds: str, num_seeds: int, **values: Tensor | None) -> None:
    """ValueError unless there are as many of each as seeds: others would go to wrong ones."""
    for name, value in values.items():
        if value is not None and len(value) != num_seeds:
            raise ValueError(f"{name} has {len(value)} values for {num_seeds} {seeds}")
