"""What the processes of the sharing tests run: importable, so that spawned ones find it."""

import os
import signal
import traceback

import torch
import torch.distributed as dist

from dataeff.memory import new_shared, share_among_ranks


def proportional_bytes():
    """This process's share of the memory it maps: a page of n processes counts 1/n."""
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("Pss:"))


def touch_all(shared, before, barrier, answers):
    """Reads every page, then says by how much the process's proportional share grew."""
    x = shared.tensor()
    own = proportional_bytes()
    total = int(x.numpy().sum(dtype="int64"))  # not by OpenMP, which a fork breaks
    barrier.wait()
    answers.put((total, proportional_bytes() - own, before))
    barrier.wait()


def write_and_die(shared):
    shared.tensor()[7] = 42
    os.kill(os.getpid(), signal.SIGKILL)


def make_and_die(to_parent):
    x = new_shared((1 << 20,), torch.uint8)
    x[-1] = 9
    to_parent.send(os.getpid())
    signal.pause()


def send_back(to_parent, shared):
    to_parent.send(shared)
    to_parent.recv()


def run_rank(rank, store, answers, fail):
    """One rank: takes the shared tensor, writes its place in it, reads the others' places."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    made = []

    def make():
        made.append(rank)
        if fail:
            raise FileNotFoundError("no such features")
        return torch.arange(20.0).view(10, 2)[2:]

    try:
        x = share_among_ranks(make, timeout_s=60)
        x[rank] = -rank
        dist.barrier()
        answers.put((rank, made, x.tolist()))
    except Exception:
        answers.put((rank, made, traceback.format_exc()))
    dist.destroy_process_group()
