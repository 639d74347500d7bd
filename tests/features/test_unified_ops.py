"""Elements of host memory by torch.gather."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.features.unified_ops import _gather_elements


@given(dim=st.integers(-3, 2), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_gather_is_a_gather_of_elements(dim, seed):
    torch.manual_seed(seed)
    table = torch.rand(3, 4, 5)
    shape = [2, 3, 4]
    index = torch.randint(0, table.shape[dim], shape)
    assert torch.equal(_gather_elements(table, dim % 3, index), torch.gather(table, dim, index))
    index.view(-1)[seed % 24] = table.shape[dim]  # within the memory, but not in the dimension
    with pytest.raises(IndexError, match="60"):
        _gather_elements(table, dim % 3, index)
