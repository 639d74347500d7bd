"""The core's loops run on torch's threads, and go on in a forked child."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dataeff._threads import torch_gomp_parallel

COUNT = """
import os, torch
from dataeff.features.gather import gather
torch.set_num_threads(4)
x, ids = torch.randn(100_000, 64), torch.randint(100_000, (50_000,))
expected = torch.index_select(x, 0, ids)
(torch.randn(10_000, 100) * 2).sum()  # torch's threads are there now
before = len(os.listdir("/proc/self/task"))
assert torch.equal(gather(x, ids), expected)
print(len(os.listdir("/proc/self/task")) - before)
"""

FORK = (
    COUNT
    + """
pid = os.fork()
if pid == 0:
    # NumPy compares: operators of torch would wait for the parent's OpenMP threads.
    os._exit(0 if (gather(x, ids).numpy() == expected.numpy()).all() else 1)
print(os.waitpid(pid, 0)[1])
"""
)


def run(source: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=True
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(torch_gomp_parallel() is None, reason="torch brings another OpenMP")
def test_a_gather_starts_no_threads_of_its_own() -> None:
    assert run(COUNT) == [0]


def test_a_forked_child_gathers() -> None:
    assert run(FORK)[-1] == 0
