"""A table given to what expects a tensor, by every kind of table."""

from __future__ import annotations

import operator
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dataeff

ROWS = 7


@pytest.fixture
def x():
    return torch.arange(ROWS * 3.0).view(ROWS, 3)


@pytest.fixture(params=["plain", "small", "hot", "disk"])
def table(request, tmp_path, x):
    options = {"plain": {}, "small": {"store": "fp16"}, "hot": {"hot": dataeff.HotRows(3)}}
    if request.param == "disk":
        np.save(tmp_path / "x.npy", x.numpy())
        made = dataeff.FeatureTable.open(tmp_path / "x.npy")
    else:
        made = dataeff.FeatureTable(x, **options[request.param])
    with made:
        yield made


@pytest.mark.parametrize("read", [torch.as_tensor, torch.tensor, torch.asarray, torch.from_dlpack])
def test_as_a_tensor_it_is_all_of_its_rows(table, x, read):
    gathers = table.stats().num_gathers
    assert torch.equal(read(table), x)
    assert table.stats().num_gathers == gathers + 1  # not one for each row


def test_as_an_array_it_is_all_of_its_rows(table, x):
    gathers = table.stats().num_gathers
    assert np.array_equal(np.asarray(table), x.numpy())
    assert table.stats().num_gathers == gathers + 1
    assert np.array(table, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy=None"):
        np.array(table, copy=False)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("torch.nn.functional.embedding", lambda t, i: F.embedding(i, t)),
        ("torch.nn.functional.linear", lambda t, i: torch.nn.Linear(3, 2)(t)),
        ("torch.cat", lambda t, i: torch.cat([t, t])),
        ("torch.mean", lambda t, i: torch.mean(t)),
        ("torch.Tensor.copy_", lambda t, i: torch.zeros(ROWS, 3).copy_(t)),
    ],
)
def test_functions_of_pytorch_take_none_and_say_what_they_take(table, name, call):
    words = rf"{re.escape(name)} takes tensors, not a FeatureTable: table\[index\].*unified\(x\)"
    with pytest.raises(TypeError, match=words):
        call(table, torch.tensor([1]))


def test_index_select_says_what_to_write(table):
    """PyTorch Geometric replaces the function, with one that asks for attributes first."""
    with pytest.raises((TypeError, AttributeError), match=r"table\[index\] gathers rows"):
        torch.index_select(table, 0, torch.tensor([1]))


@pytest.mark.parametrize("sign", ["add", "sub", "mul", "truediv", "matmul", "eq", "ne", "lt", "ge"])
def test_as_an_operand_it_says_what_to_write(table, x, sign):
    apply = getattr(operator, sign)
    for left, right in ((x, table), (table, x)):
        with pytest.raises(TypeError, match=r"table\[index\] gathers rows and table\[:\] all"):
            apply(left, right)
    with pytest.raises(TypeError, match=r"table\[:\]"):
        operator.iadd(x.clone(), table)
    assert table == table and table != 0 and table in {table: 1}


def test_attributes_of_tensors_are_named_with_where_they_are(table):
    for missing in ("device", "size", "mean", "to"):
        with pytest.raises(AttributeError, match=rf"no '{missing}', which tensors.*table\[:\]"):
            getattr(table, missing)
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = table.colour
    assert not torch.is_tensor(table)


def test_it_is_counted_and_walked_through_as_a_tensor(table, x):
    assert len(table) == ROWS
    assert [row.tolist() for row in table] == x.tolist()
    assert next(reversed(table)).tolist() == x[-1].tolist()


def test_what_is_written_and_searched_otherwise_is_said(table, x):
    with pytest.raises(TypeError, match=r"table.scatter_\(index, rows\)"):
        table[0] = x[1]
    with pytest.raises(TypeError, match=r"\(table\[:\] == value\).any\(\)"):
        _ = x[0] in table
    assert torch.equal(table[:], x)
