"""The epoch benchmark at a tiny size: every provider trains on every seed."""

import math

import pytest
import torch

from dataeff.bench import epoch
from dataeff.bench.case import Options, Unavailable

pytest.importorskip("torch_geometric")


def test_every_provider_trains_on_every_seed(monkeypatch):
    monkeypatch.setattr(epoch, "BATCH", 16)
    (case,) = epoch.cases(Options(quick=True, device=torch.device("cpu")))
    inputs = epoch.make_inputs(300, 2000, 20, 40, torch.device("cpu"))
    found, refused = {}, {}
    for provider in case.providers:
        torch.manual_seed(0)
        try:
            step = provider.prepare(inputs)
        except Unavailable as reason:
            refused[provider.name] = str(reason)
            continue
        found[provider.name] = step.call()
        if step.close is not None:
            step.close()
    first = found["pattern of PyG's: CPU gather, then copy"]
    assert first[0] == 40 and first[1] == pytest.approx(math.log(16), rel=0.5)
    case.assert_same(first, found["dataeff"])
    assert "no GPU" in refused["dataeff 10 % hot"]
    with pytest.raises(AssertionError, match="trained on 39"):
        case.assert_same(first, (39, first[1]))
    with pytest.raises(AssertionError, match="mean loss"):
        case.assert_same(first, (40, first[1] * 3))
