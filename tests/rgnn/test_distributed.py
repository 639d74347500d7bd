"""Two processes under DistributedDataParallel: the mean of their gradients is one process's."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from dataeff import rgnn
from dataeff.nn import RGATConv


def halves():
    """A graph's edges for each of two ranks, and features."""
    g = torch.Generator().manual_seed(0)
    for _ in range(2):
        edge_index = torch.randint(0, 20, (2, 60), generator=g)
        graph = rgnn.Graph(edge_index, torch.randint(0, 4, (60,), generator=g), num_nodes=20)
        yield graph, torch.randn(20, 6, generator=g, dtype=torch.float64)


def model():
    torch.manual_seed(0)
    return RGATConv(6, 5, num_relations=4, heads=2).double()


def loss_of(module, graph, x):
    return module(x, graph).square().mean()


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def work(rank, store, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        save_gradients(rank, folder)
        dist.barrier()  # no rank leaves while another reads from it
    finally:
        dist.destroy_process_group()


def save_gradients(rank, folder):
    """The wrapped model ends before its group: the other way round gloo's thread may hang it."""
    module = DistributedDataParallel(model(), find_unused_parameters=True)
    loss_of(module, *list(halves())[rank]).backward()
    torch.save(gradients(module.module), f"{folder}/{rank}.pt")


def test_gradients_are_those_of_one_process(tmp_path):
    mp.spawn(work, args=(tmp_path / "store", tmp_path), nprocs=2)
    alone = model()
    (sum(loss_of(alone, *half) for half in halves()) / 2).backward()
    want = gradients(alone)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12)
