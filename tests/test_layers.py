"""Imports point downwards: a file imports only from its own room, or from rooms below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rooms from the top to the bottom. Rooms of one row do not import one another, except where
# a system has two rooms of its own.
ROWS = [
    {"cli", "doctor", "demo", "bench", "__main__"},
    {"integrations", "data"},
    {"features", "sampling", "rgnn", "nn", "offload"},
    {"memory", "storage", "ledger", "_ops", "_threads"},
    {"kernels", "_core", "_version", "_integers", "_reals", "_flags", "_worker"},
]
SYSTEMS = [{"features", "sampling"}, {"rgnn", "nn"}, {"offload"}]
SAME_ROW = [
    {"cli", "doctor", "demo", "bench", "__main__"},
    {"memory", "storage", "ledger", "_ops", "_threads"},
]


def row_of(room):
    return next(i for i, row in enumerate(ROWS) if room in row)


def allowed(room, other):
    if room == other or row_of(other) > row_of(room):
        return True
    groups = [*SYSTEMS, *SAME_ROW]
    return any(room in group and other in group for group in groups)


def rooms_imported(path, package):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], base])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "dataeff" and len(parts) > 1:
                yield node.lineno, parts[1]


def python_files():
    for path in sorted((ROOT / "dataeff").rglob("*.py")):
        if path != ROOT / "dataeff" / "__init__.py":
            yield path, path.relative_to(ROOT / "dataeff").with_suffix("").parts[0]
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield path, "kernels"


@pytest.mark.parametrize(
    "path, room", [pytest.param(p, r, id=str(p.relative_to(ROOT))) for p, r in python_files()]
)
def test_imports_point_downwards(path, room):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {room} imports {other}"
        for line, other in rooms_imported(path, package)
        if other in set().union(*ROWS) and not allowed(room, other)
    ]
    assert wrong == []


def test_every_room_has_a_place():
    rooms = {room for _, room in python_files()}
    assert rooms - set().union(*ROWS) == set()


def test_the_core_includes_no_torch_header():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "#include <torch" not in text and "#include <ATen" not in text, path


def test_only_cuda_sources_include_cuda_headers():
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]:
        assert "cuda_runtime" not in path.read_text(), path


def test_the_rule_can_fail(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("from dataeff.offload import x\nfrom ..features import y\nimport dataeff.demo\n")
    assert list(rooms_imported(bad, "dataeff.rgnn")) == [
        (1, "offload"),
        (2, "features"),
        (3, "demo"),
    ]
    assert not allowed("rgnn", "offload") and not allowed("memory", "features")
    assert allowed("demo", "rgnn") and allowed("nn", "rgnn")
