"""One rank of a training with and without offload; run by torchrun from test_distributed.py."""

import contextlib
import importlib.util
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from dataeff.integrations.pipelining import PipelineOffload
from dataeff.offload import ActivationOffload

WIDTH, ROWS = 96, 160  # activations [160, 96] and weights [96, 96] can be told apart


def block():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def collect(model, step):
    model.zero_grad(set_to_none=True)
    step()
    return [local(p.grad).clone() for p in model.parameters()]


def compare(model, plain, offloaded, offload, num_steps=3):
    expected = collect(model, plain)
    assert any(g.abs().sum() > 0 for g in expected)
    for _ in range(num_steps):
        got = collect(model, offloaded)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    report = offload.report()
    assert report.bytes_written > 0 and report.saved_bytes == 0, report
    offload.close()


def data_parallel(
    model, spill, around=contextlib.nullcontext, backward=torch.Tensor.backward, num_batches=1
):
    """The same steps, plain and offloaded; weights must never be asked about."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    batches = torch.randn(num_batches, ROWS, WIDTH, generator=generator)
    shapes = set()
    offload = ActivationOffload(
        model, spill, policy=lambda info: bool(shapes.add(tuple(info.shape))) or True, min_bytes=0
    )

    def step(context):
        for x in batches.clone().unbind():
            with around(), context:
                loss = model(x).square().mean()
                offload._cache.drain()
                backward(loss)

    compare(model, lambda: step(contextlib.nullcontext()), lambda: step(offload), offload)
    assert shapes == {(ROWS, WIDTH)}, shapes
    assert offload.report().bytes_read > 0


def accelerated(spill):
    """Mixed precision, and gradients that are reduced after the second of two batches."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = accelerator.prepare(nn.Sequential(block(), block()))
    assert accelerator.num_processes == 2 and isinstance(model, nn.parallel.DistributedDataParallel)
    data_parallel(
        model, spill, lambda: accelerator.accumulate(model), accelerator.backward, num_batches=2
    )


def ddp(spill):
    data_parallel(nn.parallel.DistributedDataParallel(nn.Sequential(block(), block())), spill)


def fsdp(spill, reshard):
    model = nn.Sequential(block(), block(), block())
    for child in model:
        fully_shard(child, reshard_after_forward=reshard)
    data_parallel(fully_shard(model, reshard_after_forward=reshard), spill)


def named(spill):
    """Modules chosen by name, with the names that wrappers put in and without."""
    model = nn.parallel.DistributedDataParallel(nn.Sequential(block(), block(), block()))
    for name in ("1", "module.1"):
        assert moved_by_name(model, name, spill) == {"module.1.0", "module.1.1"}
        assert moved_by_name(model, f"{name}.1", spill) == {"module.1.1"}
        # The model within is what some hand over, while the whole is called.
        assert moved_by_name(model, name, spill, model.module) == {"1.0", "1.1"}
    model = nn.Sequential(block(), checkpoint_wrapper(block()), block())
    for child in model:
        fully_shard(child)
    fully_shard(model)
    for name in ("2", "module.2"):
        assert moved_by_name(model, name, spill) == {"2.0", "2.1"}
    wrapped = "1._checkpoint_wrapped_module"
    for name in ("1", wrapped):
        assert moved_by_name(model, name, spill) == {wrapped}  # its input is all that is saved
    try:
        ActivationOffload(model, spill, policy=["3"])
    except ValueError as error:
        assert "no module named '3'" in str(error)
    else:
        raise AssertionError("a name that does not exist was taken")


def moved_by_name(model, name, spill, of=None):
    """The modules whose tensors moved when `name` was all that the policy named."""
    offload = ActivationOffload(of or model, spill, policy=[name], min_bytes=0)
    x = torch.randn(ROWS, WIDTH)

    def step(context):
        with context:
            loss = model(x).square().mean()
            offload._cache.drain()
            loss.backward()

    compare(model, lambda: step(contextlib.nullcontext()), lambda: step(offload), offload)
    return {scope for scope, saved in offload.report().modules.items() if saved.bytes_stored}


def pipeline(spill, interleaved):
    rank, num_chunks = dist.get_rank(), 2 if interleaved else 1
    blocks = [block() for _ in range(2 * num_chunks)]
    modules = nn.ModuleList(blocks[rank::2])
    cpu = torch.device("cpu")
    stages = [PipelineStage(m, rank + 2 * i, 2 * num_chunks, cpu) for i, m in enumerate(modules)]
    loss = lambda out, target: (out - target).square().mean()  # noqa: E731
    if interleaved:
        schedule = ScheduleInterleaved1F1B(stages, 4, loss_fn=loss)
    else:
        schedule = Schedule1F1B(stages[0], 4, loss_fn=loss)
    batch = torch.randn(4 * ROWS, WIDTH)
    offload = ActivationOffload(modules, spill, min_bytes=0)
    offloaded = PipelineOffload(offload, stages)

    def step(context):
        with context:
            if rank == 0:
                schedule.step(batch)
            else:
                schedule.step(target=batch, losses=[])

    compare(modules, lambda: step(contextlib.nullcontext()), lambda: step(offloaded), offload)
    # Of each stage and microbatch one forward and one backward, and the hints were of use.
    assert len(offloaded._expected) == 2 * 4 * num_chunks
    assert offload.report().num_replans == 0, offload.report()


def main(spill):
    dist.init_process_group("gloo")
    runs = {
        "ddp": lambda: ddp(spill),
        "fsdp": lambda: fsdp(spill, True),
        "fsdp without resharding": lambda: fsdp(spill, False),
        "names": lambda: named(spill),
        "pipeline": lambda: pipeline(spill, False),
        "interleaved": lambda: pipeline(spill, True),
    }
    if importlib.util.find_spec("accelerate") is not None:
        runs["accelerate"] = lambda: accelerated(spill)
    for name, run in runs.items():
        torch.manual_seed(0)
        run()
        if dist.get_rank() == 0:
            print("same bits:", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
