"""The cases of SSDTrain (arXiv 2408.10013, section 4) beside other offloaders, on one GPU.

BERT, GPT and T5 of width and layers (8192, 4), (12288, 3), (16384, 2), sequences of 1024, head
width 128, batch 16, bf16. All providers share one model, whose weights do not fit twice: a step is
forward and backward, and returns the loss and a sum per gradient. Where a case does not fit with
everything kept, its batch is halved until it does, and its size says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

import dataeff
from dataeff.bench.case import Case, Options, Provider, Step, Unavailable
from dataeff.bench.ceilings import RawFile
from dataeff.bench.offload.model import VOCABULARY, Kind, Shape, Transformer
from dataeff.bench.offload.training import Inputs, Metrics
from dataeff.bench.rgnn.workload import available_bytes

SIZES = ((8192, 4), (12288, 3), (16384, 2))
KINDS: tuple[Kind, ...] = ("bert", "gpt", "t5")
TOKENS, BATCH, HEAD_WIDTH = 1024, 16, 128
MOST_DISK_STEP_S = 10.0
LONG_CALL_S = 4.0
# Elements saved per token and unit of width by one block (arXiv 2205.05198, with a fused
# attention) and parameters per block in units of width^2.
SAVED_PER_TOKEN, PARAMETERS_PER_BLOCK = 18, 12


def cases(options: Options) -> Iterator[Case]:
    """Nine cases; without a GPU every provider is skipped with the reason."""
    for kind in options.pick(full=KINDS, quick=("gpt",)):
        for width, layers in options.pick(full=SIZES, quick=SIZES[:1]):
            batch = _batch_that_fits(width, layers, options.device)
            shape = Shape(layers, width, batch, TOKENS, kind, HEAD_WIDTH, torch.bfloat16)
            reduced = "" if batch == BATCH else f" (batch {BATCH} does not fit)"
            yield Case(
                size=f"ssdtrain {kind}: {shape}{reduced}",
                group=f"SSDTrain's {kind}",
                inputs=partial(_inputs, shape, options),
                providers=tuple(_providers()),
                tolerance=(2e-2, 1e-2),  # attention's backward sums in any order on a GPU
                # Pinning as it goes, a peer may take many times as long as the others together.
                long_call_s=options.pick(full=float("inf"), quick=LONG_CALL_S),
            )


def _batch_that_fits(width: int, layers: int, device: torch.device) -> int:
    batch = BATCH
    if device.type != "cuda":
        return batch
    free = torch.cuda.mem_get_info(device)[0]
    states = 2 * 2 * PARAMETERS_PER_BLOCK * layers * width**2  # weights and gradients
    while (
        batch > 1 and states + 2 * SAVED_PER_TOKEN * width * layers * TOKENS * batch > 0.85 * free
    ):
        batch //= 2
    return batch


def _inputs(shape: Shape, options: Options) -> Inputs | None:
    if options.device.type != "cuda":
        return None
    return shared_inputs(shape, options)


def shared_inputs(shape: Shape, options: Options) -> Inputs:
    """Weights of which there is one copy, made on the device."""
    with torch.device(options.device):
        model = Transformer(shape).to(shape.dtype)
        tokens = torch.randint(VOCABULARY, (shape.batch, shape.tokens))
    return Inputs(shape, dict(model.state_dict()), tokens, options.directory)


def _providers() -> Iterator[Provider]:
    def peer(name: str, around: Callable[[], Any], *requires: str) -> Provider:
        return Provider(name, partial(_step, around=around), requires=requires)

    yield peer("keep", nullcontext)
    yield peer("torch save_on_cpu", partial(save_on_cpu, pin_memory=True))
    yield Provider("torch checkpoint", partial(_step, around=nullcontext, recompute=True))
    tune = partial(_offloader, "torchtune.training")
    yield peer("torchtune OffloadActivations", tune, "torchtune")
    trl = partial(_offloader, "trl.models.activation_offloading")
    yield peer("trl OffloadActivations", trl, "trl")
    yield Provider("dataeff host", partial(_ours, on_disk=False), role="ours")
    yield Provider("dataeff disk", partial(_ours, on_disk=True), role="ours")


def _offloader(module: str) -> AbstractContextManager[object]:
    """The class of that name, as torchtune and TRL both have it."""
    made: AbstractContextManager[object] = import_module(module).OffloadActivations()
    return made


def _model(inputs: Inputs | None) -> tuple[Transformer, Tensor]:
    if inputs is None:
        raise Unavailable("the paper's sizes need a CUDA GPU")
    with torch.device("meta"):
        model = Transformer(inputs.shape)
    model.load_state_dict(inputs.weights, assign=True)
    return model, inputs.tokens


def _train(model: Transformer, tokens: Tensor, around: AbstractContextManager[object]) -> Any:
    with around:
        loss = model(tokens)
        loss.backward()
    sums = [p.grad.float().abs().mean() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.detach(), torch.stack(sums)


def _step(inputs: Inputs | None, around: Callable[[], Any], recompute: bool = False) -> Step:
    model, tokens = _model(inputs)
    model.recompute = recompute
    return Step(lambda: _train(model, tokens, around()))


def saved_bytes(shape: Shape) -> int:
    """About what a step saves for backward, in bytes."""
    per_block = SAVED_PER_TOKEN * shape.width * shape.tokens * shape.batch
    return shape.layers * per_block * shape.dtype.itemsize


def _ours(inputs: Inputs | None, on_disk: bool) -> Step:
    model, tokens = _model(inputs)
    assert inputs is not None
    nbytes = saved_bytes(inputs.shape)
    if on_disk:
        _require_fast_disk(inputs.directory, nbytes)
    # Pinning is slow: half as much again as is likely to be needed. Peers hold pinned memory too,
    # and a host without memory ends the process.
    host_bytes = 0 if on_disk else min(nbytes * 3 // 2, available_bytes() // 2)
    offload = dataeff.ActivationOffload(model, [inputs.directory] if on_disk else None, host_bytes)

    def metrics() -> Metrics:
        report = offload.report()
        return {
            "peak_saved_bytes": (report.peak_held_bytes, "bytes"),
            "exposed_wait_per_step": (report.exposed_wait_s / max(1, report.num_steps), "s"),
        }

    return Step(lambda: _train(model, tokens, offload), close=offload.close, metrics=metrics)


def _require_fast_disk(directory: Path, nbytes: int) -> None:
    """Declines to write `nbytes` a step to a disk that takes longer than anybody would wait."""
    blocks = RawFile(directory, 256 << 20)
    try:
        start_s = time.perf_counter()
        blocks.write()
        seconds = (time.perf_counter() - start_s) * nbytes / blocks.nbytes
    finally:
        blocks.close()
    if seconds > MOST_DISK_STEP_S:
        raise Unavailable(
            f"{directory} would take {seconds:.0f} s to write the {nbytes} bytes of one step"
        )
