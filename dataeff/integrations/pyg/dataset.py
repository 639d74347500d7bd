"""A PyG graph as files that are mapped rather than read.

    python -m dataeff.integrations.pyg data.pt folder

A folder holds `dataset.json`, one file per attribute of nodes or edges (`.npy`; `.safetensors` for
dtypes that NumPy lacks), which `FeatureTable.open` reads, one per array of each CSC graph, and one
for all other attributes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

from dataeff._flags import checked_bool
from dataeff.features import FeatureTable, convert
from dataeff.features.table_files import read_header
from dataeff.features.whole_files import whole_file, whole_folder
from dataeff.integrations.pyg.attributes import (
    Attributes,
    kept_attributes,
    read_attributes,
    write_attributes,
)
from dataeff.integrations.pyg.graph import (
    has_row_per_node,
    hetero_graphs,
    homogeneous_graph,
    is_table,
    with_node_counts,
)
from dataeff.integrations.pyg.stores import CSCGraphStore, TableFeatureStore
from dataeff.sampling import CSCGraph
from dataeff.sampling.hetero import EdgeType

NODE = "node"
EDGE = (NODE, "to", NODE)
MANIFEST = "dataset.json"
ATTRIBUTES = "attributes.pt"
NOT_OF_NUMPY = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def save_dataset(
    data: Data | HeteroData, folder: str | Path, say: Callable[[str], None] = lambda line: None
) -> None:
    """Writes the graph and the attributes of `data` into a new folder.

    What belongs to the whole graph or a whole type is kept where it is a dense tensor or plain
    Python (numbers, strings, None; lists, tuples and dicts of them); one warning names the rest.

    The folder appears when it is complete and on the disk; after an error (a full disk) nothing of
    it is left, and what a killed process left goes with the next `save_dataset` to it. A `Data` is
    written with one node type, `node`, and one edge type, `("node", "to", "node")`.

    Args:
        data: tensors of any dtype that `.npy` or `.safetensors` holds, or tables.
        folder: must not exist.
        say: called with the name of each attribute and graph before it is written.

    Raises:
        FileExistsError: `folder` exists, or another process is writing it.
        OSError: the files cannot be written.
        TypeError: `data` is of another class, or an attribute has a dtype that NumPy lacks.
    """
    if not isinstance(data, (Data, HeteroData)):
        raise TypeError(
            f"data must be a Data or HeteroData, not {type(data).__name__}; a data set's "
            "graph is dataset[0]"
        )
    data = with_node_counts(data)
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: name a new folder, or remove it")
    others = kept_attributes(_others(data))
    with whole_folder(folder) as partial:
        manifest = {
            "tables": _save_tables(data, partial, say),
            "graphs": _save_graphs(data, partial, say),
            "attributes": _save_attributes(others, partial, say),
        }
        text = json.dumps(manifest, indent=1).encode()
        with whole_file(partial / MANIFEST, len(text), overwrite=False) as file:
            file.write(text)


def open_dataset(
    folder: str | Path, *, on_disk: bool = False, cache_bytes: int = 64 << 20
) -> tuple[TableFeatureStore, CSCGraphStore]:
    """Opens a folder of `save_dataset`: the pair that `NeighborLoader` takes for its `data`.

    Nothing is read but the graph, once, to check it. Tables are mapped: pages come in as they are
    touched, and writes to a table stay private to the process. Much larger than memory they are
    faster `on_disk`, read in batches by `FeatureTable.open`. What is of no node or edge is in the
    feature store's `attributes`, by node or edge type; of the graph under None.

    Args:
        folder: what `save_dataset` wrote.
        on_disk: opens the tables by `FeatureTable.open` instead of mapping them.
        cache_bytes: of each such table.

    Raises:
        FileNotFoundError: there is no dataset in `folder`, or a file of it is missing.
        ValueError: a file is truncated or damaged, or the graph is not valid.
    """
    on_disk, folder = checked_bool("on_disk", on_disk), Path(folder)
    table = partial(FeatureTable.open, cache_bytes=cache_bytes) if on_disk else _mapped_table
    text = (folder / MANIFEST).read_text()
    try:
        manifest = json.loads(text)
        tables = {(_group(e["group"]), e["name"]): folder / e["file"] for e in manifest["tables"]}
        graphs = {
            _group(e["edge_type"]): (
                {key: folder / file for key, file in e["files"].items()},
                e["num_src_nodes"],
            )
            for e in manifest["graphs"]
        }
        others = manifest.get("attributes")  # None where there are none
        attributes = None if others is None else folder / others
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is damaged, write the dataset again: {error!r}"
        ) from error
    return (
        TableFeatureStore(
            {key: table(file) for key, file in tables.items()},
            attributes=None if attributes is None else read_attributes(attributes),
        ),
        CSCGraphStore({key: _mapped_graph(*kept) for key, kept in graphs.items()}),
    )


def _save_tables(
    data: Data | HeteroData, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for store in data.stores:
        for name, value in store.items():
            group = _group_of(data, store, name, value)
            if group is None:
                continue
            say(f"{group} {name}: {list(value.shape)}, {value.dtype}")
            suffix = ".safetensors" if value.dtype in NOT_OF_NUMPY else ".npy"
            file = f"table-{len(entries)}{suffix}"
            convert(value, folder / file)
            entries.append({"group": group, "name": name, "file": file})
    return entries


def _others(data: Data | HeteroData) -> list[tuple[Any, str, Any]]:
    """Node or edge type, name and value of what no table and no graph holds."""
    return [
        (store._key, name, value)
        for store in data.stores
        for name, value in store.items()
        if name != "edge_index" and _group_of(data, store, name, value) is None
    ]


def _save_attributes(others: Attributes, folder: Path, say: Callable[[str], None]) -> str | None:
    for group, values in others.items():
        say(f"{'graph' if group is None else group} {', '.join(values)}")
    if not others:
        return None
    write_attributes(others, folder / ATTRIBUTES)
    return ATTRIBUTES


def _group_of(data: Data | HeteroData, store: Any, name: str, value: Any) -> Any:
    """The node or edge type whose rows an attribute holds; None when it holds none."""
    if store is data.__dict__.get("_global_store"):  # of a HeteroData, which has no rows
        return None
    if is_table(value):
        by_node = isinstance(data, Data) and has_row_per_node(name, len(value), data)
    elif name != "edge_index" and isinstance(value, Tensor):
        by_node = store.is_node_attr(name)
        if not (by_node or store.is_edge_attr(name)):
            return None
    else:
        return None
    return (NODE if by_node else EDGE) if isinstance(data, Data) else store._key


def _save_graphs(
    data: Data | HeteroData, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    graphs: dict[EdgeType, CSCGraph]
    if isinstance(data, Data):
        graphs = {EDGE: homogeneous_graph(data, None, None)}
    else:
        graphs = hetero_graphs(data, None, None)
    entries = []
    for i, (key, graph) in enumerate(graphs.items()):
        say(f"{key}: {graph.num_edges} edges")
        arrays = {"colptr": graph.colptr, "row": graph.row}
        if graph.e_id is not None:
            arrays["e_id"] = graph.e_id
        files = {name: f"graph-{i}-{name}.npy" for name in arrays}
        for name, array in arrays.items():
            convert(array, folder / files[name])
        entries.append({"edge_type": key, "files": files, "num_src_nodes": graph.num_src_nodes})
    return entries


def _mapped_table(path: Path) -> FeatureTable:
    rows = read_header(path)
    if not rows.row_nbytes * rows.shape[0]:  # nothing to map
        return FeatureTable(torch.empty(rows.shape, dtype=rows.dtype, device="cpu"))
    # Copy-on-write, as below.
    nbytes = np.memmap(path, np.uint8, "c", rows.offset, rows.row_nbytes * rows.shape[0])
    return FeatureTable(torch.from_numpy(nbytes).view(rows.dtype).view(rows.shape))


def _mapped_graph(files: dict[str, Path], num_src_nodes: int) -> CSCGraph:
    arrays = {key: _mapped(file) for key, file in files.items()}
    return CSCGraph.from_csc(
        arrays["colptr"], arrays["row"], e_id=arrays.get("e_id"), num_src_nodes=num_src_nodes
    )


def _mapped(path: Path) -> Tensor:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: the dataset is damaged, write it again")
    try:
        # Copy-on-write: the file stays as it is, and torch need not warn of read-only memory.
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    except ValueError as error:
        raise ValueError(f"{path} is damaged, write the dataset again: {error}") from error


def _group(name: str | list[str]) -> Any:
    return tuple(name) if isinstance(name, list) else name
