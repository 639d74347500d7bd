import hashlib

import pytest
import torch

from dataeff.data.code_graph import NODE_TYPES, RELATIONS, build_code_graph
from dataeff.data.text_features import WordMask, hashed_ngrams


def edges_of(graph, relation):
    chosen = graph.edge_type == RELATIONS.index(relation)
    names = graph.node_names
    return sorted((names[s], names[t]) for s, t in graph.edge_index[:, chosen].T.tolist())


SHAPE, SQUARE = "geo.shapes.Shape", "geo.shapes.Square"
EXPECTED = {
    "contains": [
        ("geo.shapes", SHAPE),
        ("geo.shapes", SQUARE),
        (SHAPE, f"{SHAPE}.area"),
        (SHAPE, f"{SHAPE}.side"),
        (SQUARE, f"{SQUARE}.side"),
        ("geo.units", "geo.units.metre"),
        ("geo.units", "geo.units.register"),
        ("geo.units.metre", "geo.units.metre.inner"),
    ],
    "imports": [
        ("geo", SQUARE),
        ("geo.shapes", "geo.units"),
        ("geo.shapes", "geo.units.metre"),
    ],
    "inherits": [(SQUARE, SHAPE)],
    "calls": [
        (f"{SHAPE}.area", "geo.units.metre"),
        (f"{SHAPE}.area", f"{SHAPE}.side"),
        (f"{SQUARE}.side", f"{SHAPE}.area"),
        ("geo.units.metre", "geo.units.metre.inner"),
    ],
    "decorates": [("geo.units.register", SQUARE)],
    "refers_to": [("geo.units.metre.inner", "value")],
    "takes": [("geo.units.metre", "value")],
}


@pytest.mark.parametrize("relation", EXPECTED)
def test_every_edge_of_a_small_package(geometry, zoo, relation):
    graph = build_code_graph(geometry + zoo, min_files=3)
    found = [edge for edge in edges_of(graph, relation) if any("geo" in end for end in edge)]
    assert found == sorted(EXPECTED[relation])


def test_every_edge_has_its_inverse(zoo):
    graph = build_code_graph(zoo, min_files=3)
    half = len(RELATIONS) // 2
    for relation in range(half):
        forward = graph.edge_index[:, graph.edge_type == relation]
        back = graph.edge_index[:, graph.edge_type == relation + half]
        assert sorted(forward.T.tolist()) == sorted(back.flip(0).T.tolist())
    assert graph.num_relations >= 12
    assert (graph.edge_index[1].diff() >= 0).all()
    assert (graph.edge_index[0] != graph.edge_index[1]).all()


def test_an_attribute_of_an_unknown_value_may_mean_few_methods(package, zoo):
    few = "".join(f"class C{i}:\n    def poke(self): pass\n" for i in range(2))
    many = "".join(f"class D{i}:\n    def prod(self): pass\n" for i in range(9))
    use = "def use(x):\n    x.poke()\n    x.prod()\ndef again(y): y.prod()\n"
    files = package({"few": few, "many": many, "use": use})
    graph = build_code_graph(files + zoo, min_files=3)
    calls = [edge for edge in edges_of(graph, "calls") if edge[0].startswith("use.")]
    assert calls == [
        ("use.again", "prod"),
        ("use.use", "few.C0.poke"),
        ("use.use", "few.C1.poke"),
        ("use.use", "prod"),
    ]


def test_circles_of_imports_and_bases_end(package, zoo):
    files = {
        "a": "from b import thing\nfrom b import *\nclass K(K): pass\ndef f(): thing()\n",
        "b": "from a import thing\nfrom a import *\nimport a\ndef g(): a.thing.x(); nowhere()\n",
    }
    graph = build_code_graph(package(files) + zoo, min_files=3)
    assert ("b.g", "b") not in edges_of(graph, "calls")


def test_the_split_is_by_file_and_every_class_is_in_every_part(zoo):
    graph = build_code_graph(zoo, min_files=3)
    assert graph.class_names == ["falcon", "ibex", "walrus"]
    parts_of_file = {}
    for node in (graph.y >= 0).nonzero().flatten().tolist():
        file = ".".join(graph.node_names[node].split(".")[:2])
        parts_of_file.setdefault(file, set()).add(int(graph.split[node]))
        assert NODE_TYPES[graph.node_type[node]] == "function"
        assert graph.class_names[graph.y[node]] == graph.node_names[node].split(".")[0]
    assert all(len(parts) == 1 for parts in parts_of_file.values())
    for part in ("train", "val", "test"):
        assert set(graph.y[graph.nodes_of(part)].tolist()) == {0, 1, 2}
    assert not torch.equal(graph.split, build_code_graph(zoo, min_files=3, seed=1).split)


def test_no_feature_tells_the_class(zoo):
    """The three packages differ in nothing but their names, so their features must be the same."""
    graph = build_code_graph(zoo, min_files=3)
    for i in range(5):
        rows = {
            tuple(graph.x[graph.node_names.index(name)].tolist())
            for name in (f"{a}.part{i}.{a}_feed_{i}" for a in graph.class_names)
        }
        assert len(rows) == 1 and any(rows.pop())
    names = graph.x[graph.node_type == NODE_TYPES.index("name")]
    assert len(names) and {"falcon", "ibex", "walrus"} <= graph.masked_words
    for word in graph.class_names:
        alone = graph.x[graph.node_names.index(word)]
        assert not alone.any(), "a name node that is a class name must be silent"


def test_a_module_is_known_by_its_docstring_and_never_by_its_name(package, zoo):
    files = package({"secret": '"""Opens doors."""\n', "bare": "x = 1\n"})
    graph = build_code_graph(files + zoo, min_files=3)
    mask = WordMask(graph.class_names)
    expected = torch.from_numpy(hashed_ngrams([mask("Opens doors.")], graph.x.shape[1]))[0]
    assert torch.equal(graph.x[graph.node_names.index("secret")], expected)
    assert not graph.x[graph.node_names.index("bare")].any()


def test_the_same_files_give_the_same_graph_in_any_process(zoo):
    def digest(graph):
        tensors = (graph.edge_index, graph.edge_type, graph.node_type, graph.x, graph.y)
        return [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors]

    first = build_code_graph(zoo, min_files=3, num_workers=0)
    second = build_code_graph(zoo, min_files=3, num_workers=2)
    assert digest(first) == digest(second) and first.node_names == second.node_names


def test_files_that_are_not_python_are_counted(package, zoo):
    bad = package({"bad": b"def f(:\n", "worse": b"\x00"})
    graph = build_code_graph(bad + zoo, min_files=3)
    assert graph.num_skipped == 2 and graph.num_files == len(zoo)


def test_a_package_of_just_enough_files_is_a_class(zoo):
    assert len(build_code_graph(zoo, min_files=5).class_names) == 3
    with pytest.raises(ValueError, match="0 packages have 6 files"):
        build_code_graph(zoo, min_files=6)


def test_too_few_packages_is_an_error(geometry, zoo):
    with pytest.raises(ValueError, match="two classes"):
        build_code_graph(geometry)
    with pytest.raises(ValueError, match="min_files=2"):
        build_code_graph(zoo, min_files=2)


def test_a_share_of_the_installed_python_is_a_task():
    graph = build_code_graph(scale=0.05, min_files=4, dim=16)
    assert graph.num_nodes > 1000 and graph.num_edges > 10 * graph.num_nodes
    assert len(graph.class_names) >= 2
    assert graph.edge_index.min() >= 0 and graph.edge_index.max() < graph.num_nodes
    norms = graph.x.norm(dim=1)
    assert ((norms - 1).abs().lt(1e-5) | norms.eq(0)).all()
    assert "torch" in graph.masked_words
