import resource
import time

import pytest
import torch

from dataeff.bench import Options, Step, Unavailable, cases, rgnn
from dataeff.bench.rgnn import limits


class Work:
    x = torch.zeros(1)


def called(call, **limit):
    step = limits.within_limits(lambda work: Step(call), **limit)(Work())
    step.call()
    return step


def test_a_step_that_takes_too_long_is_declined():
    slept = []
    with pytest.raises(Unavailable, match="one step did not finish in 1 s"):
        called(lambda: [slept.append(time.sleep(0.05)) for _ in range(1000)], seconds=1)
    assert len(slept) < 1000


def test_a_backward_that_takes_too_long_is_interrupted():
    """Autograd runs its operators without Python between them."""
    x = torch.zeros((), requires_grad=True)
    total = sum(x.expand(4000, 4000)[0, 0] for _ in range(2000))  # backward fills each matrix
    with pytest.raises(Unavailable, match="one step did not finish in 1 s"):
        called(total.backward, seconds=1)
    assert x.grad is None


def test_memory_that_is_not_there_is_declined_and_the_limit_lifted(monkeypatch):
    monkeypatch.setattr(limits, "available_bytes", lambda: 1 << 30)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(Unavailable, match=r"allocate.*1\.1 GB were free"):
        called(lambda: torch.empty(1 << 34, dtype=torch.uint8))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_other_errors_are_not_hidden_and_what_keeps_the_limits_runs():
    with pytest.raises(RuntimeError, match="shapes"):
        called(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    counted = []
    step = called(lambda: counted.append(1))
    assert counted == [1] and step.call() is None and counted == [1, 1]


def test_a_first_call_that_compiles_belongs_to_the_set_up():
    durations = iter([1.2, 0.0])
    called(lambda: time.sleep(next(durations)), seconds=1, compiles=True)


def test_only_the_cases_that_are_named_are_run():
    named = [case.size for case in cases("rgnn", Options(only="mutag"))]
    assert named and all("mutag" in size for size in named)
    assert {size.split()[0] for size in named} == {*rgnn.PYG_LAYERS, rgnn.OWN}


def test_every_dataset_width_and_growth_is_a_case():
    sizes = [case.size for case in rgnn.cases(Options())]
    assert len(sizes) == len(set(sizes))
    held = [d for d in rgnn.DATASETS if d.edges <= rgnn.MANY_EDGES]
    assert sum("dim=64" in size and "RGAT" in size for size in sizes) >= 2 * len(rgnn.DATASETS)
    assert sum("dim=128" in size for size in sizes) == 3 * len(held) >= 9
    assert any(size == "RGATConv training code dim=64" for size in sizes)
    assert any("edges=10000000" in size for size in sizes)
