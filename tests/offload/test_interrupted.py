"""Ctrl-C and skipped steps: what breaks a step off leaves an offload that serves the next one."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.storage import FaultPlan, uring_refusal
from tests.offload import interrupts


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(256, 256), nn.Tanh())])
    return model, torch.randn(256, 256)


def press_ctrl_c(*_):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_ctrl_c_leaves_a_reusable_offload(net, gradients, assert_same, tmp_path, moment):
    model, x = net

    def loss():
        return model(x).square().sum()

    expected = gradients(model, lambda: loss().backward())
    slow = FaultPlan().add("any", delay_s=0.005)
    offload = ActivationOffload(model, tmp_path, min_bytes=0, num_threads=1, faults=slow)

    def step():
        with offload:
            loss().backward()

    assert_same(gradients(model, step), expected)
    if moment == "forward":
        hook = model[4].register_forward_hook(press_ctrl_c)
    else:
        hook = model[4].register_full_backward_hook(press_ctrl_c)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            step()
    hook.remove()
    assert_same(gradients(model, step), expected)
    offload._cache.drain()
    assert offload.report().saved_bytes == 0
    assert offload._cache._tiers._spills.files[0].used_nbytes == 0
    offload.close()
    assert os.listdir(tmp_path) == []


AT_ANY_MOMENT = """
import random, signal, sys, time, torch
from torch import nn
from dataeff.offload import ActivationOffload
torch.manual_seed(0)
model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(256, 256), nn.Tanh())])
x = torch.randn(256, 256)
for _ in range(2):  # the first step of a process may round otherwise than all later ones
    model.zero_grad()
    model(x).sum().backward()
expected = [p.grad.clone() for p in model.parameters()]
offload = ActivationOffload(model, sys.argv[1], min_bytes=0)
moments = random.Random(int(sys.argv[2]))
interrupts = 0
while interrupts < 40:
    until = time.monotonic() + 0.2
    try:
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(1e-4, 2e-2))
        while time.monotonic() < until:  # Python prints what comes in a finaliser, and goes on
            with offload:
                model(x).sum().backward()
    except KeyboardInterrupt:
        interrupts += 1
model.zero_grad()
with offload:
    loss = model(x).sum()
    offload._cache.drain()
    loss.backward()
assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected))
assert offload.report().bytes_read > 0
"""


def test_ctrl_c_at_any_moment(tmp_path):
    """Also in the middle of the cache's own lines: the signal comes by a timer."""
    seed = int.from_bytes(os.urandom(4), "little")
    # As Ctrl-C does, but from the kernel's clock.
    timer = "import signal; signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
    command = [sys.executable, "-c", timer + textwrap.dedent(AT_ANY_MOMENT), str(tmp_path)]
    done = subprocess.run([*command, str(seed)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert os.listdir(tmp_path) == []


def test_a_step_that_the_scaler_skips(tmp_path):
    """An overflow in step 2: no update, half the scale, and the same weights as without."""

    def train(make_context):
        torch.manual_seed(0)
        model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(128, 128), nn.Tanh())])
        context = make_context(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
        scales = []
        for step in range(4):
            x = torch.randn(256, 128) * (float("inf") if step == 1 else 1.0)
            optimizer.zero_grad()
            with context, torch.autocast("cpu", torch.bfloat16):
                loss = model(x).float().square().mean()
                scaler.scale(loss).backward()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            skipped = all(
                torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)
            )
            assert skipped == (step == 1)
        return [p.detach().clone() for p in model.parameters()], scales

    offloads = []

    def offloaded(model):
        offloads.append(ActivationOffload(model, tmp_path, min_bytes=0))
        return offloads[0]

    weights, scales = train(lambda model: torch.enable_grad())
    got, got_scales = train(offloaded)
    assert scales == got_scales == [2.0**10, 2.0**9, 2.0**9, 2.0**9]
    assert all(torch.equal(a, b) for a, b in zip(weights, got, strict=True))
    assert offloads[0].report().bytes_written > 0
    offloads[0].close()


@pytest.mark.parametrize("moment", ["written", "read"])
def test_no_python_runs_where_autograd_lets_go_of_what_it_saved(net, tmp_path, moment):
    """It would be where a signal is heard, and what its handler raises would be lost."""
    model, x = net
    offload = ActivationOffload(model, tmp_path, min_bytes=0)
    with offload:
        out = model(x).square().sum()
        offload._cache.drain()
        if moment == "read":
            out.backward(retain_graph=True)
    ran = []
    sys.setprofile(lambda frame, event, arg: ran.append(frame.f_code) if event == "call" else None)
    try:
        del out
    finally:
        sys.setprofile(None)
    assert [code.co_qualname for code in ran] == []
    offload._cache.poll()
    assert offload.report().saved_bytes == 0 and offload.report().bytes_written > 0
    offload.close()


class Interrupted:
    """A model under an offload whose steps are interrupted, and what must hold afterwards."""

    ends = (ActivationOffload.__enter__.__code__, ActivationOffload.__exit__.__code__)

    def __init__(self, directory, late_streams, spill=False, streams=False, **options):
        if spill:
            options["spill"] = directory
        if streams:
            options["streams_of"] = lambda device: late_streams
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh())
        self.x = torch.randn(96, 96)
        self.expected = self.gradients(contextlib.nullcontext())
        self.offload = ActivationOffload(
            self.model, min_bytes=1 << 15, in_flight_bytes=1 << 16, **options
        )
        for _ in range(3):  # what is made once is there
            self.step()
        self.num_descriptors = len(os.listdir("/proc/self/fd"))

    def step(self):
        """All that a step can do: stores that end, that are cancelled; loads ahead and not."""
        with self.offload:
            loss = self.model(self.x).sum()
            self.offload._cache.drain()
            loss.backward()
        with self.offload:
            self.model(self.x).sum().backward()

    def gradients(self, context):
        self.model.zero_grad()
        with context:
            self.model(self.x).sum().backward()
        return [p.grad.clone() for p in self.model.parameters()]

    def places(self):
        """Every instruction of a step, and how often it runs."""
        return interrupts.places_in(self.step, self.ends)

    def strike(self, place, nth):
        """An interrupt there; then two steps have the right bits, and nothing is left over."""
        where = f"{interrupts.named(place)}, time {nth}"
        came = interrupts.interrupt(self.step, place, nth, self.ends)
        for _ in range(2):
            got = self.gradients(self.offload)
            assert all(map(torch.equal, got, self.expected)), where
        with contextlib.suppress(ValueError), self.offload:
            raise ValueError  # what an interrupt outside of the block has left is counted too
        cache = self.offload._cache
        cache.drain()
        tiers = cache._tiers
        left = {
            "saved": self.offload.report().saved_bytes,
            "outgoing": cache._outgoing.nbytes,
            "cached": cache.held.cached_nbytes,
            "host": tiers.used_nbytes,
        }
        if tiers._spills is not None:
            striped = tiers._spills._striped
            left["extents"] = striped.used_nbytes
            left["in flight"] = sum(lane.in_flight_nbytes for lane in striped.lanes)
        assert not any(left.values()), (where, left)
        assert len(os.listdir("/proc/self/fd")) <= self.num_descriptors, where
        return came


KINDS = {
    "threads": {"spill": True},
    "io_uring": {"spill": True, "engine": "io_uring"},
    "checksum": {"spill": True, "checksum": True},
    "host": {"host_bytes": 1 << 22, "streams": True},
    "staging": {"spill": True, "streams": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_before_any_instruction_of_a_step_loses_nothing(tmp_path, late_streams, kind):
    """Some of all of them, at their first run of a step or a later one."""
    if kind == "io_uring" and uring_refusal() is not None:
        pytest.skip(str(uring_refusal()))
    late_streams.delay_s = 1e-4
    case = Interrupted(tmp_path, late_streams, **KINDS[kind])
    places = case.places()
    assert len(places) > 300
    chosen = random.Random(kind)
    came = 0
    for place in chosen.sample(list(places), 30):
        came += case.strike(place, chosen.randint(1, places[place]))
    assert came > 15  # the pace of the disk decides what runs
    case.offload.close()


def test_an_interrupt_at_any_line_of_the_ends_of_a_block(net, tmp_path, gradients, assert_same):
    """Before the first line of `__exit__` too, as no `try` inside it can help."""
    model, x = net
    expected = gradients(model, lambda: model(x).sum().backward())
    offload = ActivationOffload(model, tmp_path, min_bytes=0)
    ends = (ActivationOffload.__enter__.__code__, ActivationOffload.__exit__.__code__)
    place = num_events = 0
    cut_off = set()

    def step():
        with offload:
            model(x).sum().backward()

    def interrupt(frame, event, arg):
        nonlocal num_events
        if frame.f_code not in ends:
            return None
        num_events += 1
        if num_events == place:
            cut_off.add((frame.f_code.co_name, event))
            raise KeyboardInterrupt
        return interrupt

    while place == 0 or num_events >= place:
        place, num_events = place + 1, 0
        try:
            sys.settrace(interrupt)
            step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*an interrupt cut off the end")
            assert_same(gradients(model, step), expected)
        assert_same(gradients(model, step), expected)  # without a warning
        offload._cache.drain()
        assert offload.report().saved_bytes == 0, place
        assert not offload.looks
    assert cut_off >= {
        (name, event) for name in ("__enter__", "__exit__") for event in ("call", "line", "return")
    }
    assert offload._cache._tiers._spills.files[0].used_nbytes == 0
    offload.close()


def test_a_nested_block_ends_the_one_around_it_and_says_so(net, tmp_path, gradients, assert_same):
    model, x = net
    expected = gradients(model, lambda: model(x).sum().backward())
    offload = ActivationOffload(model, tmp_path, min_bytes=0)

    def step():
        with pytest.warns(RuntimeWarning, match="nested"), offload, offload:
            model(x).sum().backward()

    assert_same(gradients(model, step), expected)
    assert offload.report().bytes_written > 0 and not offload.looks
    with offload, ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="thread"):
        pool.submit(offload.__enter__).result()
    offload.close()
