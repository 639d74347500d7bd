"""What a flag takes: True and False, whoever's bool they are, and nothing that counts as one."""

import numpy as np
import pytest
import torch

import dataeff
from dataeff.sampling import CSCGraph, HeteroNeighborSampler, NeighborSampler

X, IDS = torch.randn(9, 4), torch.tensor([1, -1, 1])
GRAPH = CSCGraph(torch.tensor([[0, 1, 2], [1, 2, 0]]))
EDGES = ("n", "to", "n")


def prefetched(unique):
    with dataeff.FeatureTable(X) as table:
        return table.prefetch(IDS, unique=unique).wait()


FLAGS = {
    "huge_pages": lambda flag: dataeff.FeatureTable(X.clone(), huge_pages=flag),
    "sort": lambda flag: dataeff.FeatureTable(X, sort=flag),
    "unique": lambda flag: dataeff.FeatureTable(X).gather(IDS, unique=flag),
    "unique of a prefetch": prefetched,
    "propagate": lambda flag: dataeff.unified(X, propagate=flag),
    "shared": lambda flag: dataeff.HostEmbedding(3, 2, shared=flag),
    "freeze": lambda flag: dataeff.HostEmbedding.from_pretrained(X, freeze=flag),
    **{
        flag: lambda value, flag=flag: NeighborSampler(GRAPH, [2], **{flag: value})
        for flag in ("replace", "disjoint", "induced")
    },
    **{
        f"{flag} of types": lambda value, flag=flag: HeteroNeighborSampler(
            {EDGES: GRAPH}, [2], **{flag: value}
        )
        for flag in ("replace", "disjoint", "induced")
    },
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_bools(name):
    for value in (True, False, np.bool_(True), np.False_):
        FLAGS[name](value)
    for value in ("yes", "", 1, 0.0, torch.tensor(True), []):
        with pytest.raises(TypeError, match=f"^{name.split()[0]}=.* is neither True nor False"):
            FLAGS[name](value)


@pytest.mark.parametrize("flag", ["sparse", "scale_grad_by_freq"])
def test_flags_of_an_embedding_that_have_one_value(flag):
    with pytest.raises(TypeError, match=f"{flag}='no' is neither"):
        dataeff.HostEmbedding(3, 2, **{flag: "no"})


def test_flags_of_last():
    timed = CSCGraph(torch.tensor([[0, 1], [1, 0]]), edge_time=torch.tensor([3, 4]))
    for make in (
        lambda last: NeighborSampler(timed, [2], last=last),
        lambda last: HeteroNeighborSampler({EDGES: timed}, [2], last=last),
    ):
        make(True)
        with pytest.raises(TypeError, match="last='no' is neither True nor False"):
            make("no")


def test_a_conversion_is_not_told_to_overwrite_by_a_word(tmp_path):
    target = dataeff.convert(X, tmp_path / "x.npy")
    with pytest.raises(TypeError, match="overwrite='no' is neither True nor False"):
        dataeff.convert(X + 1, target, overwrite="no")
    with dataeff.FeatureTable.open(target) as table:
        assert torch.equal(table[:], X)


def test_faults_are_a_plan(tmp_path):
    target = dataeff.convert(X, tmp_path / "x.npy")
    with pytest.raises(TypeError, match="faults='x' is no FaultPlan"):
        dataeff.FeatureTable.open(target, faults="x")
