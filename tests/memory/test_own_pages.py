"""Small tensors move out of the heap before their pages are registered."""

import mmap

import numpy as np
import torch
from torch import nn

from dataeff.memory import HostBuffer
from dataeff.memory.own_pages import move_to_own_pages


def test_views_move_along():
    x = torch.arange(1000, dtype=torch.float32).reshape(100, 10)
    view, same, before = x[3:7, 2:], x.clone(), x.data_ptr()
    move_to_own_pages(view)
    assert x.data_ptr() != before and x.data_ptr() % mmap.PAGESIZE == 0
    view[0, 0] = -1
    assert x[3, 2] == -1
    same[3, 2] = -1
    assert torch.equal(x, same)
    once = x.data_ptr()
    move_to_own_pages(x)
    assert x.data_ptr() == once


def test_a_parameter_stays_one():
    weight = nn.Parameter(torch.ones(3))
    move_to_own_pages(weight)
    (weight * 2).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_what_others_address_stays():
    array, exported = np.zeros(5), torch.zeros(5)
    seen = exported.numpy()
    large = torch.empty(32 << 20, dtype=torch.uint8)
    kept = [torch.from_numpy(array), exported, HostBuffer(64).tensor(torch.uint8, (64,)), large]
    kept.append(torch.empty(0))
    before = [x.data_ptr() for x in kept]
    for x in kept:
        move_to_own_pages(x)
    assert [x.data_ptr() for x in kept] == before
    exported[2] = 1
    assert seen[2] == 1


def test_no_room_is_said_and_the_memory_stays(monkeypatch, recwarn):
    def refuse(_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch.UntypedStorage, "share_memory_", refuse)
    x = torch.ones(3)
    before = x.data_ptr()
    move_to_own_pages(x)
    assert "No space left" in str(recwarn.pop(RuntimeWarning).message)
    assert x.data_ptr() == before
