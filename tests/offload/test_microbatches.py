"""Several microbatches between their forward and their backward, as a pipeline has them."""

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload

# Interleaved 1F1B of one rank with two chunks of the model and four microbatches: (what, chunk,
# microbatch). The chunks' borders are cut as between ranks, so that each has its own backward.
ORDER = [
    ("F", 0, 0), ("F", 0, 1), ("F", 1, 0), ("F", 1, 1), ("F", 0, 2), ("B", 1, 0), ("F", 0, 3),
    ("B", 1, 1), ("F", 1, 2), ("B", 0, 0), ("F", 1, 3), ("B", 0, 1), ("B", 1, 2), ("B", 1, 3),
    ("B", 0, 2), ("B", 0, 3),
]  # fmt: skip


@pytest.fixture
def chunks():
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(96, 96), nn.Tanh())])
        for _ in range(2)
    )


def run(chunks, offload=None, hints=True):
    """One step; the wait after each action lets everything be written that can be."""
    inputs = [torch.randn(64, 96, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    borders, outputs = {}, {}
    for place, (what, chunk, i) in enumerate(ORDER):
        if what == "F":
            x = inputs[i] if chunk == 0 else outputs[0, i].detach().requires_grad_()
            borders[chunk, i] = x
            if offload is None:
                outputs[chunk, i] = chunks[chunk](x)
            else:
                with offload.microbatch(2 * i + chunk):
                    outputs[chunk, i] = chunks[chunk](x)
        else:
            out = outputs.pop((chunk, i))
            out.backward(torch.ones_like(out) if chunk == 1 else borders[1, i].grad)
        if offload is not None:
            offload._cache.drain()
            if hints and place + 1 < len(ORDER) and ORDER[place + 1][0] == "B":
                offload.expect_backward(2 * ORDER[place + 1][2] + ORDER[place + 1][1])
                offload._cache.drain()


@pytest.mark.parametrize("hints", [False, True])
def test_interleaved_order_gives_the_same_bits(chunks, gradients, assert_same, tmp_path, hints):
    expected = gradients(chunks, lambda: run(chunks))
    offload = ActivationOffload(chunks, tmp_path, min_bytes=0)

    def step():
        with offload:
            run(chunks, offload, hints)

    for _ in range(3):
        assert_same(gradients(chunks, step), expected)
    report = offload.report()
    assert report.bytes_read > 0 and report.saved_bytes == 0
    assert report.num_replans == 0  # every microbatch has its own order, and it holds
    offload.close()


def test_a_hint_brings_back_before_backward_asks(chunks, tmp_path):
    offload = ActivationOffload(chunks, tmp_path, min_bytes=0, prefetch_bytes=1 << 20)
    with offload:
        outputs = []
        for i in range(2):
            with offload.microbatch(i):
                outputs.append(chunks[0](torch.randn(64, 96)).sum())
        offload._cache.drain()
        assert offload.report().bytes_read == 0
        offload.expect_backward(1)
        offload._cache.drain()
        fetched = offload.report().bytes_read
        assert fetched > 0
        outputs.pop().backward()
        assert offload.report().bytes_read == fetched
        outputs.pop().backward()
    assert offload.report().bytes_read == 2 * fetched
    offload.close()


def test_a_hint_for_a_microbatch_that_never_ran_does_nothing(chunks, tmp_path):
    offload = ActivationOffload(chunks, tmp_path, min_bytes=0)
    with offload:
        offload.expect_backward(7)
    assert offload.report().bytes_read == 0
    offload.close()


def test_accumulation_over_several_forwards(chunks, gradients, assert_same, tmp_path):
    inputs = [torch.randn(64, 96) for _ in range(3)]

    def all_forwards_first(offload=None):
        losses = []
        for i, x in enumerate(inputs):
            if offload is None:
                losses.append(chunks[0](x).square().mean())
            else:
                with offload, offload.microbatch(i):
                    losses.append(chunks[0](x).square().mean())
        if offload is not None:
            offload._cache.drain()
        for loss in losses:
            loss.backward()

    expected = gradients(chunks[0], all_forwards_first)
    offload = ActivationOffload(chunks[0], tmp_path, min_bytes=0)
    for _ in range(2):
        assert_same(gradients(chunks[0], lambda: all_forwards_first(offload)), expected)
    assert offload.report().bytes_written > 0 and offload.report().saved_bytes == 0
    offload.close()
