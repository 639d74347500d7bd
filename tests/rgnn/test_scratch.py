"""Memory that values use in turn: found again, bounded, that of a result once it is gone."""

import gc

import pytest
import torch
from rgnn_layers import gated, rgat, rgcn_mean

from dataeff import rgnn
from dataeff.rgnn import execute
from dataeff.rgnn.scratch import SCRATCH, Scratch

MB = 1 << 20


def test_a_block_is_found_again_for_a_value_of_nearly_its_size():
    kept = Scratch(64 * MB)
    block = kept.take(8 * MB)
    assert kept.nbytes == 0
    kept.give(block)
    assert kept.nbytes == 8 * MB
    assert kept.take(7 * MB) is block
    assert kept.nbytes == 0
    for other in (3, 9):  # the block would hold far too much, or too little
        kept.give(block)
        assert kept.take(other * MB) is not block


def test_a_new_block_takes_the_place_of_idle_ones():
    kept = Scratch(64 * MB)
    blocks = [kept.take(size * MB) for size in (4, 6, 8)]
    for block in blocks:
        kept.give(block)
    kept.take(10 * MB)
    assert kept.nbytes == 8 * MB


def test_idle_blocks_are_bounded_and_can_be_given_back():
    kept = Scratch(20 * MB)
    blocks = [kept.take(8 * MB) for _ in range(3)]
    for block in blocks:
        kept.give(block)
    assert kept.nbytes == 16 * MB
    assert kept.take(8 * MB) is not blocks[0]
    kept.clear()
    assert kept.nbytes == 0


def test_lent_memory_comes_back_with_the_last_view():
    kept = Scratch(64 * MB)
    lent = kept.lend(8 * MB)
    assert (lent.dtype, lent.nbytes, lent.untyped_storage().nbytes()) == (torch.uint8, *2 * [8 * MB])
    row = lent.view(torch.float32).view(-1, 64)[3]
    place = lent.data_ptr()
    del lent
    assert kept.nbytes == 0
    row.fill_(2.0)
    assert row.tolist() == 64 * [2.0]
    del row
    assert kept.nbytes == 8 * MB
    assert kept.take(8 * MB).data_ptr() == place


def test_lent_memory_comes_back_from_a_cycle_collected_while_blocks_are_counted():
    kept = Scratch(64 * MB)
    ring = [kept.lend(8 * MB)]
    ring.append(ring)
    del ring

    class Idle(list):
        def __iter__(self):
            gc.collect()
            return super().__iter__()

    kept._idle = Idle()
    kept.give(torch.empty(4 * MB, dtype=torch.uint8))
    assert kept.nbytes == 12 * MB


def _problem(layer):
    g = torch.Generator().manual_seed(3)
    graph = rgnn.Graph(
        torch.randint(0, 3000, (2, 60_000), generator=g),
        torch.randint(0, 20, (60_000,), generator=g),
        num_nodes=3000,
    )
    x, W = torch.randn(3000, 32, generator=g), torch.randn(20, 32, 32, generator=g) / 6
    a, root, edge = (torch.randn(n, generator=g) for n in ((20, 32), (32, 32), (60_000,)))
    rest = {
        rgcn_mean: (root / 6, a[0]),
        rgat: (a, a + 1),
        gated: (root / 6, a[:, 0].contiguous(), edge),
    }[layer]
    return graph, [t.clone().requires_grad_() for t in (x, W, *rest)]


def _train(layer, graph, inputs):
    y = layer(graph, *inputs)
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("layer", [rgcn_mean, rgat, gated], ids=lambda f: f.name)
def test_results_are_the_same_and_stay_so(layer, monkeypatch):
    graph, inputs = _problem(layer)
    with monkeypatch.context() as alone:
        alone.setattr(execute, "SMALLEST_NBYTES", 1 << 60)
        alone.setattr(execute, "SMALLEST_LENT_NBYTES", 1 << 60)
        SCRATCH.clear()
        want = _train(layer, graph, inputs)
        assert SCRATCH.nbytes == 0
    monkeypatch.setattr(execute, "SMALLEST_NBYTES", 1)
    monkeypatch.setattr(execute, "SMALLEST_LENT_NBYTES", 1)
    found = [_train(layer, graph, inputs) for _ in range(3)]
    assert SCRATCH.nbytes > 0
    results = {t.untyped_storage().data_ptr() for run in found for t in run}
    assert len(results) == sum(map(len, found))
    for run in found:  # the first one's too, after others have used the same memory
        for a, b in zip(want, run, strict=True):
            assert torch.equal(a, b)
    SCRATCH.clear()


def test_a_result_takes_the_memory_of_one_that_is_gone(monkeypatch):
    monkeypatch.setattr(execute, "SMALLEST_LENT_NBYTES", 1)
    graph, inputs = _problem(rgcn_mean)
    SCRATCH.clear()
    kept = rgcn_mean(graph, *inputs)
    gone = rgcn_mean(graph, *inputs)
    place = gone.data_ptr()
    del gone
    again = rgcn_mean(graph, *inputs)
    assert again.data_ptr() == place != kept.data_ptr()
    assert torch.equal(again, kept)
    SCRATCH.clear()
