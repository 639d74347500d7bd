"""Aliases of host memory, which keep its owner."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataeff.features import unified_memory
from dataeff.features.unified_memory import DLPACK_CPU, byte_alias


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    start=st.integers(0, 5),
    step=st.integers(1, 3),
    dtype=st.sampled_from([torch.uint8, torch.bool, torch.bfloat16, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_an_alias_has_the_elements_of_any_view(rows, columns, start, step, dtype):
    x = torch.randint(0, 2, (rows, columns)).to(dtype).t()[start % columns :: step]
    alias = byte_alias(x, DLPACK_CPU, 0, None)
    assert torch.equal(alias, x) and alias.stride() == x.stride() and alias.dtype == dtype
    alias.fill_(1)
    assert (x == 1).all()


@pytest.mark.parametrize("view", [torch.conj, lambda z: z.conj().imag, lambda z: z.conj()[1:, 0]])
def test_an_alias_of_a_lazy_view_has_its_values(view):
    x = view(torch.randn(3, 2, dtype=torch.complex64))
    alias = byte_alias(x, DLPACK_CPU, 0, None)
    assert torch.equal(alias, x) and alias.data_ptr() == x.data_ptr()


def test_an_alias_keeps_its_owner_until_it_is_gone():
    class Owner:
        pass

    owner = Owner()
    alive = weakref.ref(owner)
    x = torch.ones(3)
    alias = byte_alias(x, DLPACK_CPU, 0, owner)
    capsule = unified_memory._core.alias_capsule(x.data_ptr(), 12, 1, 0, owner)
    del owner
    view = alias[1:]
    del alias, capsule
    assert alive() is not None
    del view
    assert alive() is None
