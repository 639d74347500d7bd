"""A long run grows nothing; a killed one leaves nothing; forks and tight limits do no harm."""

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload
from dataeff.storage import FaultPlan


def resident_nbytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_thousand_steps_grow_nothing(tmp_path):
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)])
    x = torch.randn(128, 64)
    offload = ActivationOffload(model, tmp_path, min_bytes=0)

    def after(num_steps):
        for _ in range(num_steps):
            with offload:
                model(x).square().sum().backward()
        offload._cache.drain()
        gc.collect()
        spill = offload._cache._tiers._spills.files[0]
        return (
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            len(os.listdir("/proc/self/task")),
            os.fstat(spill.fd).st_size,
            spill.used_nbytes,
        )

    before, resident = after(100), resident_nbytes()
    # What earlier tests left may go meanwhile.
    assert all(now <= then for now, then in zip(after(900), before, strict=True))
    # What grew by as much as a byte a bit per step and storage would be far more than this.
    assert resident_nbytes() - resident < 16 << 20
    assert offload.report().saved_bytes == 0
    offload.close()


def test_an_offload_that_is_forgotten_takes_everything_with_it(tmp_path):
    """A notebook's cell that is run again and again, and closes nothing."""
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]), torch.randn(128, 64)

    def count():
        gc.collect()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), hooks

    def forget(num_steps, **options):
        offload = ActivationOffload(model, tmp_path, min_bytes=0, **options)
        for _ in range(num_steps):
            with offload:
                model(x).square().sum().backward()

    kinds = ((0, "all"), (2, "all"), (4, "auto"), (20, "auto"))
    for num_steps, policy in kinds:
        forget(num_steps, policy=policy)  # what they import may have threads of its own
    before = count()
    assert before[2] == 0
    for num_steps, policy in kinds:
        forget(num_steps, policy=policy)
        assert all(now <= then for now, then in zip(count(), before, strict=True)), policy


def test_an_offload_in_a_cycle_is_closed_by_whoever_collects_it(tmp_path, late_streams):
    """The thread that writes ended first, and the collector waited for it for ever."""
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]), torch.randn(128, 64)
    options = {"min_bytes": 0, "streams_of": lambda device: late_streams}
    offload = ActivationOffload(model, tmp_path, **options)
    with offload:
        model(x).square().sum().backward()
    assert offload.report().bytes_written and late_streams.pinned
    cycle = [offload]
    cycle.append(cycle)
    del offload, cycle
    gc.collect()
    assert not late_streams.pinned


def test_a_graph_outlives_the_offload_that_it_was_made_under(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(128, 64)
    params = list(model.parameters())
    expected = torch.autograd.grad(model(x).square().sum(), params)
    offload = ActivationOffload(model, tmp_path, min_bytes=0)
    with offload:
        loss = model(x).square().sum()
        offload._cache.drain()
    del offload
    gc.collect()
    got = torch.autograd.grad(loss, params)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


KILLED = """
import sys, torch
from torch import nn
from dataeff.offload import ActivationOffload
from dataeff.memory import HostBuffer
model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
offload = ActivationOffload(model, sys.argv[1], min_bytes=0)
x = torch.randn(1024, 256)
shared = HostBuffer(1 << 20, shared=True)
print("going", flush=True)
while True:
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
        loss.backward()
"""


def test_sigkill_at_random_moments_leaves_no_file_and_no_shared_memory(tmp_path):
    seed = random.randrange(1 << 30)
    moments = random.Random(seed)
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        with child:
            assert child.stdout.readline() == "going\n"
            time.sleep(moments.uniform(0, 0.15))
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [], f"seed {seed}"
    left = {name for name in set(os.listdir("/dev/shm")) - before if "dataeff" in name}
    assert not left, f"seed {seed}"


def test_a_forked_child_exits_and_the_parent_goes_on(tmp_path, gradients, assert_same):
    """What a DataLoader's workers do while a step is under way."""
    model, x = nn.Sequential(nn.Linear(128, 128), nn.Tanh()), torch.randn(128, 128)
    expected = gradients(model, lambda: model(x).sum().backward())
    slow = FaultPlan().add("write", delay_s=0.01)
    offload = ActivationOffload(model, tmp_path, min_bytes=0, num_threads=1, faults=slow)

    def step():
        with offload:
            loss = model(x).sum()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
                child = multiprocessing.get_context("fork").Process(target=gc.collect)
                child.start()
            child.join(30)
            assert child.exitcode == 0
            loss.backward()

    assert_same(gradients(model, step), expected)
    offload.close()


@pytest.mark.parametrize("engine", ["threads", "io_uring"])
def test_no_memory_may_be_locked(tmp_path, engine):
    """RLIMIT_MEMLOCK binds who is not root; the engines do not depend on it."""
    script = f"""
    import os, resource, sys, torch
    from torch import nn
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    if os.geteuid() == 0:
        os.chmod(sys.argv[1], 0o777)
    from dataeff.offload import ActivationOffload
    from dataeff.storage import uring_refusal
    if {engine!r} == "io_uring" and uring_refusal():
        sys.exit(77)
    model, x = nn.Sequential(nn.Linear(128, 128), nn.Tanh()), torch.randn(128, 128)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    offload = ActivationOffload(model, sys.argv[1], min_bytes=0, engine={engine!r})
    with offload:
        loss = model(x).sum()
        offload._cache.drain()
        loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected))
    assert offload.report().bytes_read > 0
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("io_uring is refused here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["write", "read", "any"])
@pytest.mark.parametrize("budget", [0, 1, 3 << 18])
def test_a_slow_disk_and_small_budgets_end(tmp_path, gradients, assert_same, way, budget):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(256, 256), nn.Tanh())])
    x = torch.randn(256, 256)
    expected = gradients(model, lambda: model(x).square().sum().backward())
    offload = ActivationOffload(
        model, tmp_path, min_bytes=0, num_threads=1, in_flight_bytes=budget,
        prefetch_bytes=budget, faults=FaultPlan().add(way, delay_s=0.004),
    )  # fmt: skip

    def step():
        with offload:
            model(x).square().sum().backward()

    for _ in range(2):
        assert_same(gradients(model, step), expected)
    offload._cache.drain()  # a write that had begun when backward came goes on to its end
    assert offload.report().saved_bytes == 0
    offload.close()


def test_slow_disk_with_backward_on_several_threads_ends(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(128, 128), nn.Tanh())])
    inputs = [torch.randn(128, 128) for _ in range(3)]
    params = list(model.parameters())
    expected = [torch.autograd.grad(model(x).sum(), params) for x in inputs]
    offload = ActivationOffload(
        model, tmp_path, min_bytes=0, num_threads=1, in_flight_bytes=0, prefetch_bytes=0,
        faults=FaultPlan().add("any", delay_s=0.002),
    )  # fmt: skip
    with offload:
        losses = [model(x).sum() for x in inputs]
    got = [None] * len(inputs)

    def run(i):
        got[i] = torch.autograd.grad(losses[i], params)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    offload.close()


BROKEN = """
import sys, torch
from torch import nn
from dataeff.offload import ActivationOffload

kept = [ActivationOffload(nn.Linear(64, 64), sys.argv[1], min_bytes=0) for _ in range(3)]
for i, offload in enumerate(kept):
    tiers, close = offload._tiers, offload._tiers.close

    def end(i=i, close=close):
        print("closed", i, flush=True)
        close()
        raise RuntimeError("the device is lost")

    tiers.close = end
"""


def test_one_that_cannot_be_closed_at_exit_leaves_the_others_to_be(tmp_path):
    command = [sys.executable, "-c", BROKEN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert sorted(done.stdout.split()) == sorted(["closed", "0", "closed", "1", "closed", "2"])
    assert done.stderr.count("the device is lost") == 1


def test_a_model_that_runs_on_another_thread_is_said(tmp_path):
    """As under `nn.DataParallel`; what runs there without gradients saves nothing anyway."""
    model = nn.Linear(4, 4)
    offload = ActivationOffload(model, tmp_path)
    with ThreadPoolExecutor(1) as pool, offload:
        pool.submit(torch.no_grad()(model), torch.ones(4)).result()
        with pytest.warns(RuntimeWarning, match=r"another thread .* torchrun"):
            pool.submit(model, torch.ones(4)).result()
        pool.submit(model, torch.ones(4)).result()  # once
        model(torch.ones(4)).sum().backward()
    offload.close()
