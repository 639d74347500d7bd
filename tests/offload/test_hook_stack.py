"""Blocks that end in another order than they should, or on a model that takes no hooks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from dataeff.offload import ActivationOffload


def make_net():
    return nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh())


def num_hooks():
    """How many pairs of hooks are in force on this thread; takes them all away."""
    found = 0
    while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        found += 1
    return found


@pytest.mark.parametrize("other", ["offload", "hooks"])
def test_blocks_that_end_in_the_order_in_which_they_began(tmp_path, gradients, assert_same, other):
    """As those of two callbacks of one trainer do."""
    net, x = make_net(), torch.randn(64, 96)
    expected = gradients(net, lambda: net(x).square().sum().backward())
    first = ActivationOffload(net, tmp_path, min_bytes=0)
    if other == "offload":
        second = ActivationOffload(net, tmp_path, min_bytes=0)
    else:
        second = saved_tensors_hooks(lambda saved: saved, lambda saved: saved)

    def step():
        first.__enter__()
        second.__enter__()
        loss = net(x).square().sum()
        first.__exit__(None, None, None)
        net(x).square().sum()  # the second is still in force
        second.__exit__(None, None, None)
        loss.backward()

    for _ in range(3):
        assert_same(gradients(net, step), expected)
        assert num_hooks() == 0
    # Until now the second had all that was saved, and the first nothing.
    assert first.report().num_packed == 0
    first.close()
    if other == "offload":
        assert second.report().num_packed == 3 * 2 * 4 and second.report().bytes_written > 0
        second.close()


def test_hooks_around_a_block_stay_in_force(tmp_path):
    net, x, seen = make_net(), torch.randn(64, 96), []
    offload = ActivationOffload(net, tmp_path, min_bytes=0)
    with saved_tensors_hooks(lambda saved: seen.append(1) or saved, lambda saved: saved):
        with offload:
            net(x).square().sum().backward()
        assert seen == []
        net(x).square().sum().backward()
    assert seen and num_hooks() == 0
    offload.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model(tmp_path, gradients, assert_same):
    """It refuses hooks on its calls."""
    net, x = torch.jit.script(make_net()), torch.randn(64, 96)
    for _ in range(4):  # until it is optimised
        expected = gradients(net, lambda: net(x).square().sum().backward())
    offload = ActivationOffload(net, tmp_path, min_bytes=0)

    def step():
        with offload:
            offload.expect_forward(x)
            loss = net(x).square().sum()
            offload._cache.drain()
            loss.backward()

    for _ in range(3):
        assert_same(gradients(net, step), expected)
    assert offload.report().bytes_read > 0 and offload.report().saved_bytes == 0
    offload.close()
    with pytest.raises(ValueError, match="block '0' is scripted"):
        ActivationOffload(net, tmp_path, policy="auto")


@pytest.mark.filterwarnings("ignore:activation offload. the model runs on another thread")
@pytest.mark.parametrize("instead", ["another thread", "other hooks"])
def test_what_saves_past_the_hooks_of_a_block_is_told(tmp_path, instead):
    net, x = make_net(), torch.randn(64, 96)
    offload = ActivationOffload(net, tmp_path, min_bytes=0)

    def forward():
        net(x).square().sum().backward()

    with offload:
        if instead == "another thread":
            with ThreadPoolExecutor(1) as pool:
                pool.submit(forward).result()
        else:
            with save_on_cpu():
                forward()
    report = offload.report()
    assert report.num_packed == 0
    assert "on the thread that entered it" in report.reason and "no other hooks" in report.reason
    offload.close()
