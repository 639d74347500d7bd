"""Steps like those that had nothing to move are not looked at, and what differs is, at once."""

import os
import signal

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from dataeff.offload import ActivationOffload
from dataeff.offload.rest import LOOK_EVERY

SMALL, LARGE = 16, 512  # rows: the storages of 16 rows stay below min_bytes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()])

    def forward(self, x, repeat=1, x2=None):
        return self.layers(x.repeat(repeat, 1) if x2 is None else x + x2)


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def offload(net, tmp_path):
    made = ActivationOffload(net, tmp_path, min_bytes=1 << 16)
    yield made
    made.close()


def step(offload, net, *args, **kwargs):
    """One step; how many tensors were looked at, and how many bytes moved."""
    before = offload.report()
    with offload:
        value = net(*args, **kwargs)
        value.square().sum().backward()
    offload._cache.drain()  # a write that backward overtook counts when it ends
    after = offload.report()
    moved = after.bytes_written - before.bytes_written
    return after.num_packed - before.num_packed, moved + after.bytes_cancelled


def rest(offload, net, num_steps=3):
    for _ in range(num_steps):
        looked = step(offload, net, torch.ones(SMALL, 64))[0]
    assert looked == 0


def test_quiet_steps_are_not_looked_at_and_the_report_says_so(offload, net, gradients, assert_same):
    x = torch.ones(SMALL, 64)
    expected = gradients(net, lambda: net(x).square().sum().backward())
    looked = []
    for _ in range(5):
        assert_same(gradients(net, lambda: looked.append(step(offload, net, x)[0])), expected)
    assert looked[0] == looked[1] > 0 and looked[2:] == [0, 0, 0]
    report = offload.report()
    assert (report.num_steps, report.num_steps_at_rest) == (5, 3)
    assert "min_bytes=65536; after that, 3 of 5 steps" in report.reason
    assert report.bytes_per_step == (report.bytes_packed - report.bytes_deduplicated) / 2
    # One hook on the model itself is all that is left.
    inner = [m for m in net.modules() if m is not net]
    assert net._forward_pre_hooks and not any(m._forward_pre_hooks for m in inner)


DIFFERENT = {
    "size": lambda: ((torch.ones(LARGE, 64),), {}),
    "number": lambda: ((torch.ones(SMALL, 64), LARGE // SMALL), {}),
    "keyword": lambda: ((torch.ones(SMALL, 64),), {"repeat": LARGE // SMALL}),
    "broadcast": lambda: ((torch.ones(SMALL, 64),), {"x2": torch.ones(LARGE // 16, SMALL, 64)}),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_call_is_looked_at_at_once(offload, net, gradients, assert_same, what):
    args, kwargs = DIFFERENT[what]()
    expected = gradients(net, lambda: net(*args, **kwargs).square().sum().backward())
    rest(offload, net)
    got = gradients(net, lambda: moved.append(step(offload, net, *args, **kwargs)[1]))
    assert_same(got, expected)
    assert moved[0] > 0
    assert offload.report().modules["layers.1"].bytes_stored > 0  # by the module that saved it
    # And it is not forgotten: the same call is looked at from its beginning now.
    assert step(offload, net, *args, **kwargs)[0] > 0


moved = []


@pytest.fixture(autouse=True)
def forget():
    moved.clear()


@pytest.mark.parametrize("what", ["eval", "no grad", "requires grad", "dtype", "autocast"])
def test_other_states_are_looked_at(offload, net, what):
    rest(offload, net)
    x = torch.ones(SMALL, 64)
    before = offload._rest.num_steps
    if what == "eval":
        net.eval()
    elif what == "requires grad":
        x.requires_grad_()
    elif what == "dtype":
        net.double()
        x = x.double()
    grad = torch.set_grad_enabled(what != "no grad")
    with offload, torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"), grad:
        net(x)
    assert offload._rest.num_steps == before


def test_a_model_that_thaws_is_looked_at_at_once(tmp_path):
    body = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 16)).requires_grad_(False)
    model, x = nn.Sequential(body, nn.Linear(16, 16)), torch.ones(LARGE, 64)
    offload = ActivationOffload(model, tmp_path, min_bytes=1 << 16)
    for _ in range(3):
        looked = step(offload, model, x)[0]
    assert looked == 0
    body.requires_grad_(True)
    assert step(offload, model, x)[1] > 0
    offload.close()


def test_it_looks_again_now_and_then(offload, net):
    """What grows without a trace in the inputs is found within so many steps."""
    rest(offload, net)
    x = torch.ones(SMALL, 64)
    net.register_forward_pre_hook(lambda module, args: (torch.ones(LARGE, 64),))
    looked = [step(offload, net, x) for _ in range(LOOK_EVERY)]
    assert [i for i, (num, _) in enumerate(looked) if num] == [LOOK_EVERY - 1]
    assert looked[-1][1] > 0
    assert step(offload, net, x)[0] > 0


def test_a_model_that_moves_something_is_always_looked_at(offload, net):
    for _ in range(4):
        assert step(offload, net, torch.ones(LARGE, 64))[1] > 0
    assert offload.report().num_steps_at_rest == 0


def test_a_callable_that_is_never_asked_rests_until_there_is_something_to_ask(net, tmp_path):
    asked = []
    offload = ActivationOffload(
        net, tmp_path, min_bytes=1 << 16, policy=lambda info: not asked.append(info)
    )
    rest(offload, net)
    assert not asked and offload.report().num_steps_at_rest == 1
    assert step(offload, net, torch.ones(LARGE, 64))[1] > 0  # seen at once
    assert asked
    offload.close()


@pytest.mark.parametrize("answer", [False, "device"])
def test_a_callable_is_asked_in_every_step_and_looked_at_where_it_changes_its_mind(
    net, tmp_path, gradients, assert_same, answer
):
    x = torch.ones(4 * LARGE, 64)
    expected = gradients(net, lambda: net(x).square().sum().backward())
    asked = []

    def policy(info):
        asked.append(info)
        return answer

    offload = ActivationOffload(net, tmp_path, policy=policy, min_bytes=1 << 16)
    looked, of_step = [], []
    for _ in range(5):
        asked.clear()
        looked.append(step(offload, net, x)[0])
        of_step.append(list(asked))
    assert looked[0] == looked[1] > 0 and looked[2:] == [0, 0, 0]
    assert of_step[0] and all(infos == of_step[0] for infos in of_step)
    assert {info.scope for info in of_step[-1]} >= {"layers.1", "layers.3"}
    assert offload.report().num_steps_at_rest == 3
    answer = True
    assert_same(gradients(net, lambda: moved.append(step(offload, net, x)[1])), expected)
    assert moved[0] > 0  # in that very step
    assert step(offload, net, x)[1] > 0
    offload.close()


def test_a_callable_is_asked_about_each_call_of_a_step(net, tmp_path):
    """Of microbatches of other sizes, and of one that is not among those that are known."""
    asked = []
    offload = ActivationOffload(
        net, tmp_path, policy=lambda info: bool(asked.append(info)), min_bytes=1 << 16
    )

    def steps(*rows):
        asked.clear()
        before = offload.report().num_packed
        with offload:
            for num in rows:
                net(torch.ones(num, 64)).square().sum().backward()
        return offload.report().num_packed - before, [info.shape[0] for info in asked]

    for _ in range(2):
        num_looked, rows = steps(LARGE, 2 * LARGE)
        assert num_looked and set(rows) == {LARGE, 2 * LARGE}
    assert steps(LARGE, 2 * LARGE) == (0, rows)
    assert steps(2 * LARGE) == (0, [num for num in rows if num == 2 * LARGE])
    num_looked, now = steps(LARGE, 3 * LARGE)
    assert num_looked and set(now) == {LARGE, 3 * LARGE}
    offload.close()


def test_a_callable_that_is_asked_before_the_model_is_called_is_always_asked(net, tmp_path):
    asked = []
    offload = ActivationOffload(
        net, tmp_path, policy=lambda info: bool(asked.append(info)), min_bytes=1 << 16
    )
    for i in range(5):
        with offload:
            x = torch.ones(LARGE, 64, requires_grad=True).exp()
            assert len(asked) == i + 1
            net(x[:SMALL].clone()).sum().backward()
    assert offload.report().num_steps_at_rest == 0
    offload.close()


def test_what_a_callable_was_asked_about_is_bounded(net, tmp_path, monkeypatch):
    monkeypatch.setattr("dataeff.offload.rest._MOST_ASKED", 8)
    offload = ActivationOffload(net, tmp_path, policy=lambda info: False, min_bytes=1 << 16)
    for i in range(20):
        step(offload, net, torch.ones(LARGE + i, 64))
        assert sum(map(len, offload._rest._quiet.values())) <= 8
    offload.close()


def test_a_model_that_is_not_called_itself_is_always_looked_at(offload, net):
    for _ in range(5):
        before = offload.report().num_packed
        with offload:
            net.layers(torch.ones(SMALL, 64)).sum().backward()
        assert offload.report().num_packed > before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_inputs_are_always_looked_at(tmp_path, layout):
    model = nn.Linear(64, 64)
    offload = ActivationOffload(model, tmp_path)
    rows = torch.nested.nested_tensor([torch.ones(3, 64), torch.ones(5, 64)], layout=layout)
    for _ in range(4):
        with offload:
            model(rows)
    assert offload.report().num_steps_at_rest == 0
    offload.close()


def test_contexts_around_the_call_keep_their_order(offload, net, gradients, assert_same):
    x = torch.ones(LARGE, 64)
    expected = gradients(net, lambda: net(x).square().sum().backward())
    rest(offload, net)

    def inside_another():
        with offload, save_on_cpu():
            value = net(x)
            value = value.square().sum()  # the other one's again
        value.backward()

    assert_same(gradients(net, inside_another), expected)
    num_packed = offload.report().num_packed
    net(x).square().sum().backward()  # nothing is left behind
    assert offload.report().num_packed == num_packed


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_call_leaves_nothing_behind(offload, net, gradients, assert_same, error):
    x = torch.ones(LARGE, 64)
    expected = gradients(net, lambda: net(x).square().sum().backward())
    rest(offload, net)

    def fail(module, args):
        if error is KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
        raise error

    hook = net.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(error), offload:
        net(x)
    hook.remove()
    num_packed = offload.report().num_packed
    net(x).square().sum().backward()
    assert offload.report().num_packed == num_packed
    assert_same(gradients(net, lambda: step(offload, net, x)), expected)


def test_a_plan_that_keeps_everything_rests(net, tmp_path):
    pytest.importorskip("scipy")
    offload = ActivationOffload(net, tmp_path, policy="auto", memory_budget=1e12, min_bytes=0)
    for _ in range(17):
        assert step(offload, net, torch.ones(LARGE, 64))[0] > 0
    assert offload.plan.declines
    looked = [step(offload, net, torch.ones(LARGE, 64))[0] for _ in range(4)]
    assert looked[0] > 0 and looked[-1] == 0
    assert offload.measured.step_s > 0 and offload.measured.peak_bytes > 0
    offload.close()
