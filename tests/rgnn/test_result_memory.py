"""Memory that values of layers use in turn: that of a result once it is gone."""

import pytest
import torch
from rgnn_layers import gated, rgat, rgcn_mean

from dataeff import rgnn
from dataeff.memory.scratch import ARENAS, SCRATCH, clear_idle
from dataeff.rgnn import arena, execute, plan


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


def _forget_plans(monkeypatch):
    """Where values stand is planned once for graphs of one size."""
    monkeypatch.setattr(plan, "_COMPILED", {})
    plan._plan_for.cache_clear()


@pytest.mark.parametrize("layer", [rgcn_mean, rgat, gated], ids=lambda f: f.name)
def test_results_are_the_same_and_stay_so(layer, monkeypatch):
    graph, inputs = _problem(layer)
    _forget_plans(monkeypatch)
    with monkeypatch.context() as alone:
        alone.setattr(arena, "SMALLEST_NBYTES", 1 << 60)
        alone.setattr(execute, "SMALLEST_LENT_NBYTES", 1 << 60)
        clear_idle()
        want = _train(layer, graph, inputs)
        assert SCRATCH.nbytes == ARENAS.nbytes == 0
    _forget_plans(monkeypatch)
    monkeypatch.setattr(arena, "SMALLEST_NBYTES", 1)
    monkeypatch.setattr(execute, "SMALLEST_LENT_NBYTES", 1)
    found = [_train(layer, graph, inputs) for _ in range(3)]
    assert ARENAS.nbytes > 0
    results = {t.untyped_storage().data_ptr() for run in found for t in run}
    assert len(results) == sum(map(len, found))
    for run in found:  # the first one's too, after others have used the same memory
        for a, b in zip(want, run, strict=True):
            assert torch.equal(a, b)
    clear_idle()


def test_a_result_takes_the_memory_of_one_that_is_gone(monkeypatch):
    monkeypatch.setattr(execute, "SMALLEST_LENT_NBYTES", 1)
    graph, inputs = _problem(rgcn_mean)
    clear_idle()
    kept = rgcn_mean(graph, *inputs)
    gone = rgcn_mean(graph, *inputs)
    place = gone.data_ptr()
    del gone
    again = rgcn_mean(graph, *inputs)
    assert again.data_ptr() == place != kept.data_ptr()
    assert torch.equal(again, kept)
    clear_idle()


def test_a_step_that_fails_keeps_no_block(monkeypatch):
    _forget_plans(monkeypatch)
    monkeypatch.setattr(arena, "SMALLEST_NBYTES", 1)
    graph, inputs = _problem(gated)
    clear_idle()
    before, taken = ARENAS.used_nbytes, []
    run = execute.Executor._run

    def failing(self, number, step, view, values, like, memory):
        run(self, number, step, view, values, like, memory)
        if memory.block is not None:
            taken.append(ARENAS.used_nbytes)
            raise ArithmeticError("on purpose")

    monkeypatch.setattr(execute.Executor, "_run", failing)
    with pytest.raises(ArithmeticError, match="on purpose"):
        gated(graph, *inputs)
    assert taken[0] > before and ARENAS.used_nbytes == before
    clear_idle()
