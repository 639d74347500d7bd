"""Any view of a storage comes back as it was; no two storages are taken for one."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.offload.identity import StorageTable, VersionProbe, View, changed_in_place, revive

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.complex64]


@st.composite
def views(draw):
    """A tensor that is some view of a storage of 32 x 48 x 4 elements."""
    dtype = draw(st.sampled_from(DTYPES))
    base = torch.arange(32 * 48 * 4).to(dtype).view(32, 48, 4)
    for _ in range(draw(st.integers(0, 4))):
        dim = draw(st.integers(0, base.dim() - 1))
        kind = draw(st.sampled_from(["narrow", "transpose", "step", "expand", "select", "flat"]))
        if kind == "narrow" and base.size(dim) > 1:
            start = draw(st.integers(0, base.size(dim) - 1))
            base = base.narrow(dim, start, draw(st.integers(1, base.size(dim) - start)))
        elif kind == "transpose":
            base = base.transpose(dim, draw(st.integers(0, base.dim() - 1)))
        elif kind == "step":
            base = base[(slice(None),) * dim + (slice(None, None, draw(st.integers(1, 3))),)]
        elif kind == "expand" and base.dim() < 5:
            base = base.unsqueeze(0).expand(2, *base.shape)
        elif kind == "select" and base.dim() > 1:
            base = base.select(dim, draw(st.integers(0, base.size(dim) - 1)))
        elif kind == "flat" and base.is_contiguous():
            base = base.view(-1)
    return base


class Saves(torch.autograd.Function):
    """Saves what it is given and keeps what it gets back."""

    @staticmethod
    def forward(ctx, x, out, *tensors):
        ctx.out = out
        ctx.save_for_backward(*tensors)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.out.extend(ctx.saved_tensors)
        return grad, None, *(None for _ in ctx.saved_tensors)


@given(view=views(), shift=st.integers(0, 7))
def test_view_over_the_same_bytes_is_the_tensor(view, shift):
    item = view.element_size()
    raw = torch.empty(0, dtype=torch.uint8)
    raw = raw.set_(view.untyped_storage(), 0, (view.untyped_storage().nbytes(),), (1,))
    moved = torch.cat([torch.zeros(shift * item, dtype=torch.uint8), raw])
    again = View.of(view).over(moved.untyped_storage(), shift * item)
    assert torch.equal(again, view) and again.stride() == view.stride()
    assert View.of(again, shift * item) == View.of(view)


@settings(max_examples=25, deadline=None)
@given(tensors=st.lists(views(), min_size=1, max_size=4))
def test_any_views_come_back_from_disk(tensors, tmp_path_factory):
    gc.freeze()  # what was there before need not be looked through at each collection
    offload = ActivationOffload(
        nn.Identity(), tmp_path_factory.getbasetemp(), min_bytes=0, in_flight_bytes=0
    )
    x, out = torch.ones(1, requires_grad=True), []
    expected = [t.clone() for t in tensors]
    with offload:
        y = Saves.apply(x, out, *tensors)
        offload._cache.drain()
        tensors.clear()
        gc.collect()
        y.backward()
    for got, want in zip(out, expected, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
    out.clear()
    del y, got
    gc.collect()
    gc.unfreeze()
    offload.close()


def test_chunks_of_equal_shape_are_told_apart():
    q, k, v = torch.arange(12.0).view(2, 6).chunk(3, dim=1)
    assert len({View.of(q), View.of(k), View.of(v)}) == 3


def test_a_storage_that_is_gone_is_not_found():
    table, storage = StorageTable(), torch.ones(3).untyped_storage()
    address = storage._cdata
    known = table.lookup(storage)
    assert table.find(address) is known
    del storage
    assert table.find(address) is None


def test_a_reused_address_is_a_new_generation():
    table, seen = StorageTable(), set()
    for _ in range(1000):  # the allocator hands the same block out again and again
        storage = torch.empty(1000).untyped_storage()
        generation = table.lookup(storage).generation
        assert table.lookup(storage).generation == generation
        assert generation not in seen
        seen.add(generation)
    assert len(table) <= 256


def test_probe_follows_the_counter_without_the_memory():
    x = torch.randn(1000)
    probe = VersionProbe(x)
    weak = table_weak(x)
    x.add_(1)
    assert probe.current == probe.version + 1
    again = probe.attach(torch.zeros(3))
    del x
    assert weak.expired()
    again.mul_(2)
    assert probe.current == probe.version + 2


def table_weak(x):
    return StorageTable().lookup(x.untyped_storage()).weak


def test_revive_needs_somebody_else_and_enough_bytes():
    x = torch.arange(10)
    weak = table_weak(x)
    assert revive(weak, 80).data_ptr() == x.data_ptr()
    assert revive(weak, 81) is None
    del x
    assert revive(weak, 1) is None


def test_error_for_a_change_in_place_names_size_and_versions():
    with pytest.raises(RuntimeError, match=r"\[2, 3\] is at version 5; expected version 4"):
        raise changed_in_place((2, 3), 4, 5)
