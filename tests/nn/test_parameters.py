"""Parameters stand in PyTorch Geometric's order: an optimiser's state names them by number."""

import pytest

from dataeff import nn

pyg = pytest.importorskip("torch_geometric.nn")

# Names that are not in the order of the alphabet.
METADATA = (["z", "a"], [("z", "w", "a"), ("a", "b", "z"), ("a", "a", "a")])
LAYERS = [
    *(("RGCNConv", (8, 8, 4), o) for o in ({}, {"num_bases": 2}, {"num_blocks": 2})),
    *(("RGATConv", (8, 8, 4), o) for o in ({}, {"num_bases": 2}, {"edge_dim": 3, "heads": 2})),
    *(("HGTConv", (width, 8, METADATA), {"heads": 2}) for width in (8, -1, {"z": 4, "a": 8})),
]


@pytest.mark.parametrize(("name", "arguments", "options"), LAYERS, ids=str)
def test_names_in_order(name, arguments, options):
    ours, theirs = (getattr(m, name)(*arguments, **options) for m in (nn, pyg))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
