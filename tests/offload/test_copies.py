"""A model under an offload is copied and saved like any other."""

import copy
import functools
import gc
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dataeff.offload import ActivationOffload
from dataeff.offload.planner import Action


def steps(model, offload, num_steps=1):
    for _ in range(num_steps):
        with offload:
            model(torch.ones(64, 64).cumsum(0) / 64).square().mean().backward()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(64, 64), nn.Tanh())])


def by_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, AveragedModel, by_pickle])
@pytest.mark.parametrize("policy", ["all", "auto"])
def test_a_copy_of_the_model_knows_nothing_of_the_offload(model, tmp_path, duplicate, policy):
    offload = ActivationOffload(model, tmp_path, min_bytes=0, policy=policy)
    steps(model, offload, 4)  # with auto: while it measures
    other = duplicate(model)
    before = offload.report().num_packed
    x = torch.ones(64, 64)
    with torch.no_grad():
        expected = model(x)
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(x), expected)
    other(x).sum().backward()
    assert offload.report().num_packed == before
    steps(model, offload)
    offload.close()
    del offload
    gc.collect()
    assert torch.equal(other(x), expected)


def test_a_block_that_is_recomputed_is_so_only_in_the_step(model, tmp_path):
    offload = ActivationOffload(model, tmp_path, min_bytes=0, policy="auto", memory_budget=1e9)
    steps(model, offload, 17)  # measured; and the plan is made
    plan = offload.plan
    offload._auto.plan = replace(plan, actions=(Action.RECOMPUTE,) * len(plan.actions))
    with offload:
        assert any("forward" in vars(block) for block in model)
    assert not any("forward" in vars(block) for block in model)
    with pytest.raises(ZeroDivisionError), offload:
        1 / 0  # noqa: B018
    assert not any("forward" in vars(block) for block in model)
    other = copy.deepcopy(model)
    x = torch.ones(64, 64)
    expected = model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(x), expected)
    offload.close()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, AveragedModel, by_pickle])
def test_a_copy_made_while_blocks_are_recomputed_has_their_own_forwards(model, tmp_path, duplicate):
    model[2].forward = functools.partial(model[2].forward)  # as who casts what comes out sets it
    x = torch.ones(64, 64)
    model(x).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    offload = ActivationOffload(model, tmp_path, min_bytes=0, policy="auto", memory_budget=1e9)
    steps(model, offload, 17)
    plan = offload.plan
    offload._auto.plan = replace(plan, actions=(Action.RECOMPUTE,) * len(plan.actions))
    model.zero_grad()
    with offload:
        other = duplicate(model)
    own = other.module if isinstance(other, AveragedModel) else other
    del own[2].forward  # which computes with the parameters of the model, offload or none
    own(x).sum().backward()
    assert all(map(torch.equal, [p.grad for p in own.parameters()], expected))
    assert all(p.grad is None for p in model.parameters())
    offload.close()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_offload_is_not_copied(model, tmp_path, duplicate):
    offload = ActivationOffload(model, tmp_path)
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        duplicate(offload)
    offload.close()
