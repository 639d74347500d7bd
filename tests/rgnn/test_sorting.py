from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataeff import _core
from dataeff.rgnn import sorting
from dataeff.rgnn.sorting import count_ids, find_runs, rank_ids, sort_ids

DTYPES = st.sampled_from([torch.int32, torch.int64])


@given(st.lists(st.integers(0, 8), max_size=60), DTYPES, st.integers(9, 12))
def test_a_sort_is_torchs_stable_sort(keys, dtype, num_keys):
    key = torch.tensor(keys, dtype=dtype)
    expected = torch.sort(key, stable=True).indices
    found = sort_ids(key, num_keys)
    assert found.order.dtype == found.ptr.dtype == dtype
    assert torch.equal(found.order.long(), expected)
    again, rank = rank_ids(key, num_keys)
    assert torch.equal(again.order, found.order) and torch.equal(again.ptr, found.ptr)
    assert rank.dtype == dtype and torch.equal(rank.long(), torch.argsort(expected))
    counts = torch.bincount(key, minlength=num_keys)
    assert torch.equal(found.ptr.diff().long(), counts)
    assert torch.equal(count_ids(key.sort().values, num_keys), found.ptr)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=60), DTYPES)
def test_two_sorts_make_pairs_and_their_runs_are_unique(pairs, dtype):
    a, b = torch.tensor(pairs, dtype=dtype).reshape(-1, 2).t().contiguous()
    order = sort_ids(a, 6, sort_ids(b, 6).order).order
    assert order.tolist() == sorted(range(len(pairs)), key=lambda row: (*pairs[row], row))
    runs = find_runs(a, b, order)
    unique = sorted(set(pairs))
    assert list(zip(runs.a.tolist(), runs.b.tolist(), strict=True)) == unique
    assert runs.run_of.tolist() == [unique.index(pair) for pair in pairs]
    assert runs.ptr.diff().tolist() == [pairs.count(pair) for pair in unique]
    assert runs.ptr[0] == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=60), DTYPES)
def test_torch_sorts_as_the_core_does(pairs, dtype):
    """What a GPU runs, here on the CPU."""
    a, b = torch.tensor(pairs, dtype=dtype).reshape(-1, 2).t().contiguous()

    def found():
        by_b = sort_ids(b, 6)
        by_a = sort_ids(a, 7, by_b.order)
        runs = find_runs(a, b, by_a.order)
        parts = [by_b.order, by_b.ptr, by_a.order, by_a.ptr, runs.run_of, runs.ptr, runs.a, runs.b]
        ranked, rank = rank_ids(a, 6)
        return [*parts, ranked.order, ranked.ptr, rank, count_ids(runs.a, 9)]

    expected = found()
    with mock.patch.object(sorting, "by_torch", lambda ids: True):
        for mine, other in zip(found(), expected, strict=True):
            assert mine.dtype == other.dtype and torch.equal(mine, other)


@pytest.mark.parametrize("num_keys", [1, 7, 300_000])
def test_many_rows_on_several_threads_give_the_same_bits(num_keys):
    rows = 600_000  # several chunks, of sorts and of runs
    key = torch.randint(num_keys, (rows,), dtype=torch.int32)
    other = torch.randint(3, (rows,), dtype=torch.int32)
    order = sort_ids(key, num_keys).order
    assert torch.equal(order.long(), torch.sort(key, stable=True).indices)
    order = sort_ids(key, num_keys, sort_ids(other, 3).order).order
    runs = find_runs(key, other, order)
    combined = key.long() * 3 + other
    unique, run_of, counts = torch.unique(combined, return_inverse=True, return_counts=True)
    assert torch.equal(runs.a.long() * 3 + runs.b, unique)
    assert torch.equal(runs.run_of.long(), run_of)
    assert torch.equal(runs.ptr.diff().long(), counts)


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_a_key_out_of_range_is_named(wrong):
    key = torch.tensor([0, wrong, 3], dtype=torch.int32)
    with pytest.raises(IndexError, match=f"key {wrong} of row 1 .* there are 4 keys"):
        sort_ids(key, 4)


def test_absent_outputs_are_not_written():
    key, ptr = torch.tensor([2, 0, 2]), torch.full((4,), -1)
    _core.counting_sort(8, key.data_ptr(), 0, 3, 3, 0, 0, ptr.data_ptr(), 1)
    assert ptr.tolist() == [0, 1, 1, 3]
