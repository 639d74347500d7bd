"""Every kind of table inside `torch.compile(fullgraph=True)`, new or gathered from before."""

import gc

import numpy as np
import pytest
import torch

import dataeff

KINDS = {
    "plain": lambda path, x: dataeff.FeatureTable(x),
    "int8": lambda path, x: dataeff.FeatureTable(x, store="int8"),
    "hot": lambda path, x: dataeff.FeatureTable(x, hot=dataeff.HotRows(3, policy="adaptive")),
    "disk": lambda path, x: dataeff.FeatureTable.open(path),
}


@pytest.fixture
def x(tmp_path):
    x = torch.randn(40, 3, 2)
    np.save(tmp_path / "x.npy", x.numpy())
    return x


def compiled(function):
    torch.compiler.reset()  # each table is another graph of the same lines
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gathered_before", [False, True])
def test_a_gather_is_in_one_graph(tmp_path, x, kind, gathered_before):
    with KINDS[kind](tmp_path / "x.npy", x) as table:
        if gathered_before:
            table[0]

        @compiled
        def step(index, out):
            table.gather(index, out=out)
            return table[index + 1].sum(0) + table.gather(index, unique=True)[0], out * 2

        for index in (torch.tensor([3, -1, 3, 7]), torch.tensor([1, 2, -9, -9, 0])):
            total, twice = step(index, torch.empty(len(index), 3, 2))
            rows = table[:]  # what int8 makes of x
            torch.testing.assert_close(total, rows[index + 1].sum(0) + rows[index][0])
            torch.testing.assert_close(twice, rows[index] * 2)


def test_the_account_knows_of_rows_from_disk(tmp_path, x):
    with dataeff.FeatureTable.open(tmp_path / "x.npy") as table:
        compiled(lambda index: table.gather(index, dtype=torch.float32) + 1)(torch.tensor([1, 2]))
        assert table.stats().num_rows == 2 and table.stats().disk.num_misses == 2


def test_wrong_calls_of_a_graph_are_named(tmp_path, x):
    tables = [dataeff.FeatureTable.open(tmp_path / "x.npy")]
    with pytest.raises(IndexError, match="40"):
        compiled(lambda index: tables[0][index] * 2)(torch.tensor([1, 40]))
    arguments = (torch.tensor([1]), tables[0]._number, [3, 2], torch.float32, False)
    tables[0].close()
    with pytest.raises(RuntimeError, match="closed"):
        torch.ops.dataeff.gather_table(*arguments)
    tables.clear()
    torch.compiler.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="gone: keep a reference"):
        torch.ops.dataeff.gather_table(*arguments)


def test_the_operators_are_what_they_say(tmp_path, x):
    with dataeff.FeatureTable.open(tmp_path / "x.npy") as table:
        index = torch.tensor([[1, 2], [-1, 2]])
        sizes = (table._number, [3, 2], torch.float32)
        for unique in (False, True):
            torch.library.opcheck(torch.ops.dataeff.gather_table.default, (index, *sizes, unique))
            torch.library.opcheck(
                torch.ops.dataeff.gather_table_out.default,
                (index, table._number, unique, torch.empty(2, 2, 3, 2)),
            )
