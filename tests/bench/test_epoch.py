"""The epoch benchmark at a tiny size: every provider trains on every seed."""

import math

import pytest
import torch

from dataeff.bench import epoch
from dataeff.bench.case import Options, Unavailable

pytest.importorskip("torch_geometric")


NAMES = ("pattern of PyG's: CPU gather, then copy", "dataeff")


def results(case, inputs):
    found, refused = {}, {}
    for provider in case.providers:
        torch.manual_seed(0)
        try:
            step = provider.prepare(inputs)
        except Unavailable as reason:
            refused[provider.name] = str(reason)
            continue
        found[provider.name] = step.call()
        if step.metrics is not None:
            share, _ = step.metrics()["waiting_share"]
            assert 0 < share < 1
        if step.close is not None:
            step.close()
    assert "no GPU" in refused["dataeff 10 % hot"]
    assert "no GPU" in refused["dataeff, sampled on the GPU"]
    return [found[name] for name in NAMES]


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.setattr(epoch, "BATCH", 16)
    return list(epoch.cases(Options(quick=True, device=torch.device("cpu"))))


def test_every_provider_delivers_every_seed(cases):
    inputs = epoch.make_inputs(300, 2000, 20, 40, torch.device("cpu"))
    first, ours = results(cases[-1], inputs)
    assert first[0] == 40
    assert first[1] == pytest.approx(inputs.x[inputs.seeds].double().sum().item(), rel=1e-4)
    cases[-1].assert_same(first, ours)
    with pytest.raises(AssertionError, match="39 seeds"):
        cases[-1].assert_same(first, (39, first[1]))
    with pytest.raises(AssertionError):
        cases[-1].assert_same(first, (40, first[1] + 1))


def test_every_provider_trains_on_every_seed(cases):
    inputs = epoch.make_inputs(300, 2000, 20, 40, torch.device("cpu"))
    first, ours = results(cases[0], inputs)
    assert first[0] == 40 and first[1] == pytest.approx(math.log(16), rel=0.5)
    cases[0].assert_same(first, ours)
    with pytest.raises(AssertionError, match="trained on 39"):
        cases[0].assert_same(first, (39, first[1]))
    with pytest.raises(AssertionError, match="mean loss"):
        cases[0].assert_same(first, (40, first[1] * 3))


def test_a_cpu_trains_a_shorter_epoch():
    on_cpu, on_gpu = (
        next(epoch.cases(Options(device=torch.device(kind)))).size for kind in ("cpu", "cuda")
    )
    assert "trained" in on_cpu and "seeds=8192 " in on_cpu and "seeds=100000 " in on_gpu
