"""Loads from disk find the memory again that loads before them have given up."""

import pytest
import torch
from torch import nn

from dataeff.memory import scratch
from dataeff.offload import ActivationOffload


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "SMALLEST_NBYTES", 1 << 14)
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(64, 64), nn.Tanh())])
    x = torch.ones(256, 64).cumsum(0) / 256
    offload = ActivationOffload(
        model, tmp_path, min_bytes=0, policy=lambda info: True, in_flight_bytes=0, prefetch_bytes=0
    )
    yield model, x, offload
    offload.close()


def test_memory_of_loads_is_found_again_and_given_back_with_the_step(run):
    model, x, offload = run
    memory = offload._tiers._spills.memory
    (model(x).square().mean()).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    lent, addresses = memory.lend, []

    def noted(nbytes):
        block = lent(nbytes)
        addresses.append(block.data_ptr())
        return block

    memory.lend = noted
    for _ in range(2):
        model.zero_grad()
        with offload:
            model(x).square().mean().backward()
            assert memory.nbytes > 0
        assert memory.nbytes == 0
        for p, want in zip(model.parameters(), expected, strict=True):
            assert torch.equal(p.grad, want)
    assert len(addresses) >= 12 and len(set(addresses)) < len(addresses) / 2


def test_memory_of_loads_behind_the_block_is_given_back_before_the_next_forward(run):
    model, x, offload = run
    memory = offload._tiers._spills.memory
    with offload:
        loss = model(x).square().mean()
        offload._cache.drain()
    loss.backward()
    assert memory.nbytes > 0
    with offload:
        assert memory.nbytes == 0
        model(x)
