"""save_dataset and open_dataset: a PyG graph on disk, sampled and gathered through mapped files."""

import json
import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data, HeteroData

import dataeff
from dataeff.integrations.pyg import NeighborLoader, open_dataset, save_dataset
from dataeff.integrations.pyg import __main__ as script


def make_data():
    generator = torch.Generator().manual_seed(0)
    return Data(
        x=torch.randn(80, 3, generator=generator),
        y=torch.arange(80),
        mask=torch.arange(80) % 2 == 0,
        edge_attr=torch.arange(400.0),
        edge_index=torch.randint(80, (2, 400), generator=generator),
        title="not a tensor",
    )


def make_hetero():
    generator = torch.Generator().manual_seed(0)
    data = HeteroData()
    for node_type, size in {"paper": 50, "author": 20, "alone": 4}.items():
        data[node_type].x = torch.randn(size, 3, generator=generator)
    for src, name, dst in (("author", "writes", "paper"), ("paper", "cites", "paper")):
        ends = [torch.randint(data[t].num_nodes, (90,), generator=generator) for t in (src, dst)]
        data[src, name, dst].edge_index = torch.stack(ends)
    return data


def batches(data, **options):
    torch.manual_seed(0)
    return list(NeighborLoader(data, [3, 2], batch_size=16, num_workers=1, **options))


def test_a_homogeneous_graph_gives_the_same_batches(tmp_path):
    data = make_data()
    said = []
    save_dataset(data, tmp_path / "set", say=said.append)
    assert len(said) == 6  # x, y, mask, edge_attr, the graph and its title
    stores = open_dataset(tmp_path / "set")
    for left, right in zip(batches(data), batches(stores, input_nodes="node"), strict=True):
        assert torch.equal(left.n_id, right["node"].n_id)
        assert torch.equal(left.x, right["node"].x)
        assert torch.equal(left.y, right["node"].y)
        assert torch.equal(left.mask, right["node"].mask)
        assert torch.equal(left.e_id, right["node", "to", "node"].e_id)
    edge_attr = stores[0].get_tensor(("node", "to", "node"), "edge_attr", None)
    assert torch.equal(edge_attr, data.edge_attr)


def test_a_heterogeneous_graph_gives_the_same_batches(tmp_path):
    data = make_hetero()
    save_dataset(data, tmp_path / "set")
    stores = open_dataset(tmp_path / "set")
    runs = [batches(source, input_nodes="paper") for source in (data, stores)]
    for left, right in zip(*runs, strict=True):
        for node_type in ("paper", "author"):
            assert torch.equal(left[node_type].x, right[node_type].x)
        for key in data.edge_types:
            assert torch.equal(left[key].edge_index, right[key].edge_index)


@pytest.mark.parametrize("make", [make_data, make_hetero])
def test_tables_read_from_disk_give_the_same_batches(tmp_path, make):
    save_dataset(make(), tmp_path / "set")
    node_type = "node" if make is make_data else "paper"
    mapped, read = open_dataset(tmp_path / "set"), open_dataset(tmp_path / "set", on_disk=True)
    runs = [batches(stores, input_nodes=node_type) for stores in (mapped, read)]
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left[node_type].x, right[node_type].x)
    with dataeff.FeatureTable.open(tmp_path / "set" / "table-0.npy") as table:
        assert torch.equal(table[:], next(iter(make().node_stores)).x)


def test_tables_are_written_as_tensors_are(tmp_path):
    data, tabled = make_data(), make_data()
    for name in ("x", "edge_attr"):
        tabled[name] = dataeff.FeatureTable(data[name])
    save_dataset(tabled, tmp_path / "set")
    features, _ = open_dataset(tmp_path / "set")
    assert torch.equal(features.get_tensor("node", "x", None), data.x)
    edges = ("node", "to", "node")
    assert torch.equal(features.get_tensor(edges, "edge_attr", None), data.edge_attr)
    hetero = make_hetero()
    hetero["author"].x = dataeff.FeatureTable(rows := hetero["author"].x)
    save_dataset(hetero, tmp_path / "hetero")
    features, _ = open_dataset(tmp_path / "hetero")
    assert torch.equal(features.get_tensor("author", "x", None), rows)


def plain_attributes():
    return {
        "title": "a graph",
        "split": torch.arange(3),
        "scale": torch.tensor(0.5),
        "classes": {"names": ["a", "b"], 7: (1.5, None, True)},
    }


def test_attributes_of_no_row_come_back(tmp_path):
    data, hetero = make_data(), make_hetero()
    for store in (data, hetero, hetero["paper"], hetero["author", "writes", "paper"]):
        for name, value in plain_attributes().items():
            store[name] = value
    hetero["idle"].num_nodes = 5
    save_dataset(data, tmp_path / "data")
    save_dataset(hetero, tmp_path / "hetero")
    (found,) = (features := open_dataset(tmp_path / "data")[0]).attributes.items()
    rows = {attr.attr_name for attr in features.get_all_tensor_attrs()}
    assert rows == {"x", "y", "mask", "edge_attr"}
    several = open_dataset(tmp_path / "hetero", on_disk=True)[0].attributes
    assert several.pop("idle") == {"num_nodes": 5}
    assert several.keys() == {None, "paper", ("author", "writes", "paper")}
    for group, kept in [found, *several.items()]:
        expected = plain_attributes()
        assert kept.keys() == expected.keys(), group
        assert torch.equal(kept.pop("split"), expected.pop("split"))
        assert torch.equal(kept.pop("scale"), expected.pop("scale"))
        assert kept == expected


def test_a_view_is_kept_without_the_rest(tmp_path):
    data = make_data()
    data.first = torch.zeros(100_000)[:2]
    save_dataset(data, tmp_path / "set")
    assert (tmp_path / "set" / "attributes.pt").stat().st_size < 10_000


def test_one_warning_names_what_is_left_out(tmp_path):
    data, hetero = make_data(), make_hetero()
    data.who, data.seen, data.adj_t = [object()], {torch.ones(1): 2}, torch.eye(80).to_sparse()
    hetero["paper"].arr = np.zeros(3)
    with pytest.warns(UserWarning) as warned:
        save_dataset(data, tmp_path / "data")
        save_dataset(hetero, tmp_path / "hetero")
    first, second = (str(one.message) for one in warned)
    assert "who of the graph (object), seen of the graph (dict by tensors), adj_t of" in first
    assert "(torch.sparse_coo)" in first and "arr of paper (ndarray)" in second
    assert {Path(one.filename).name for one in warned} == {Path(__file__).name}
    assert open_dataset(tmp_path / "data")[0].attributes == {None: {"title": "not a tensor"}}
    assert open_dataset(tmp_path / "hetero")[0].attributes == {}


def test_a_folder_without_attributes_opens(tmp_path):
    save_dataset(make_hetero(), tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert manifest.pop("attributes") is None
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(manifest))
    assert open_dataset(tmp_path / "set")[0].attributes == {}


@pytest.mark.parametrize("on_disk", [False, True])
def test_bfloat16_and_empty_attributes(tmp_path, on_disk):
    data = make_data()
    data.half, data.none = torch.randn(80, 3).bfloat16(), torch.empty(80, 0)
    save_dataset(data, tmp_path / "set")
    features, _ = open_dataset(tmp_path / "set", on_disk=on_disk)
    for name in ("half", "none"):
        assert torch.equal(features.get_tensor("node", name, torch.arange(80)), data[name])


def test_writes_to_a_table_leave_the_file_alone(tmp_path):
    save_dataset(make_data(), tmp_path / "set")
    features, _ = open_dataset(tmp_path / "set")
    features.put_tensor(torch.zeros(1, 3), "node", "x", torch.tensor([0]))
    again, _ = open_dataset(tmp_path / "set")
    assert torch.equal(again.get_tensor("node", "x", None), make_data().x)


def test_the_script(tmp_path):
    torch.save(make_data(), tmp_path / "data.pt")
    script.main([str(tmp_path / "data.pt"), str(tmp_path / "set")])
    features, _ = open_dataset(tmp_path / "set")
    assert torch.equal(features.get_tensor("node", "y", None), torch.arange(80))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory: '.*data.pt'"),
        (b"", "data.pt is no file that torch.load reads: EOFError"),
        (b"junk", "data.pt is no file that torch.load reads: UnpicklingError"),
        ({"x": torch.zeros(3)}, "not dict.*dataset\\[0\\]"),
        (Data(x=torch.zeros(3, 1), edge_index=torch.tensor([[0], [7]])), "target node 7 of edge 0"),
        (Data(x=torch.zeros(3, 1)), "no edge_index"),
    ],
)
def test_the_script_names_a_mistake_in_a_line(tmp_path, capsys, content, said):
    file = tmp_path / "data.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(SystemExit) as ended:
        script.main([str(file), str(tmp_path / "set")])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line) and line.startswith("python -m dataeff.integrations.pyg: ")
    assert not (tmp_path / "set").exists()


def test_bad_requests_are_refused(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken"):
        save_dataset(make_data(), tmp_path / "taken")
    with pytest.raises(TypeError, match="dict"):
        save_dataset({}, tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="missing"):
        open_dataset(tmp_path / "missing")


@pytest.mark.parametrize("file", ["table-0.npy", "graph-0-row.npy"])
def test_a_full_disk_leaves_nothing_and_names_what_did_not_fit(tmp_path, file):
    def limit(line):
        if ("graph" in file) == (" edges" in line):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4500, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=rf"no space for .*{file}"):
            save_dataset(make_data(), tmp_path / "set", say=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_replaced(tmp_path):
    child = os.fork()
    if child == 0:
        save_dataset(make_data(), tmp_path / "set", say=lambda line: _kill_at(line, "edge_attr"))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert list(left.iterdir())
    save_dataset(make_data(), tmp_path / "set")
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
    features, _ = open_dataset(tmp_path / "set")
    assert torch.equal(features.get_tensor("node", "x", None), make_data().x)


def _kill_at(line, name):
    if name in line:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    def save_too(line):
        with pytest.raises(FileExistsError, match=r"another process is writing.*\.set\.partial"):
            save_dataset(make_data(), tmp_path / "set")

    save_dataset(make_data(), tmp_path / "set", say=save_too)
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
    open_dataset(tmp_path / "set")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tables": [{}], "graphs": []}'])
def test_a_damaged_list_of_files_is_named(tmp_path, text):
    save_dataset(make_data(), tmp_path / "set")
    (tmp_path / "set" / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=r"set/dataset\.json is damaged, write the dataset again"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("content", [b"", b"x" * 100, None])
def test_damaged_attributes_are_refused(tmp_path, content):
    save_dataset(make_data(), tmp_path / "set")
    file = tmp_path / "set" / "attributes.pt"
    file.write_bytes(file.read_bytes()[:-50] if content is None else content)
    with pytest.raises(ValueError, match=r"attributes\.pt is damaged, write the dataset again"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "graph", "gone"])
def test_damaged_files_are_refused(tmp_path, damage):
    save_dataset(make_data(), tmp_path / "set")
    file = tmp_path / "set" / "graph-0-row.npy"
    whole = file.read_bytes()
    said = {"gone": "graph-0-row", "graph": "source node 9999"}.get(damage, "graph-0-row")
    error = {"gone": FileNotFoundError, "graph": IndexError}.get(damage, ValueError)
    if damage == "cut":
        file.write_bytes(whole[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "header":
        file.write_bytes(b"x" * len(whole))
    elif damage == "graph":
        np.save(file, np.full(400, 9999, dtype=np.int32))
    else:
        file.unlink()
    with pytest.raises(error, match=said):
        open_dataset(tmp_path / "set")
