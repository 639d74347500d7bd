"""The cases of SSDTrain (arXiv 2408.10013, section 4) beside other offloaders, on one GPU.

BERT, GPT and T5 of width and layers (8192, 4), (12288, 3), (16384, 2), sequences of 1024, head
width 128, batch 16, bf16. All providers share one model, whose weights do not fit twice: a step is
forward and backward, and returns the loss and a sum per gradient. Where a case does not fit with
everything kept, its batch is halved until it does, and its size says so.

`dataeff auto 53 %` plans for what the paper saves, 47 % of the peak of the activations, within what
the bus hides. A case of its own keeps one batch and offloads another twice as large, the same
sequences once more, so that loss and gradients are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
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
SHARE_LEFT = 0.53
MOST_STEPS_TO_PLAN = 40

Around = Callable[[Transformer], AbstractContextManager[object]]


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
                # Attention's backward sums in any order on a GPU.
                tolerance=(2e-2, 0.0),
                # Pinning as it goes, a peer may take many times as long as the others together.
                long_call_s=options.pick(full=float("inf"), quick=LONG_CALL_S),
            )
            yield Case(
                size=f"ssdtrain batch doubled {kind}: {shape}{reduced}",
                group=f"SSDTrain's {kind}, batch doubled",
                inputs=partial(_inputs, shape, options),
                providers=(
                    _peer("keep", _nothing),
                    Provider("dataeff host, twice the batch", partial(_ours, times=2), role="ours"),
                ),
                tolerance=(2e-2, 0.0),
            )


def _batch_that_fits(width: int, layers: int, device: torch.device) -> int:
    batch = BATCH
    if device.type != "cuda":
        return batch
    free = available_bytes(device)  # what torch keeps of the case before is free for this one
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


def _peer(name: str, around: Around, *requires: str) -> Provider:
    return Provider(name, partial(_step, around=around), requires=requires)


def _providers() -> Iterator[Provider]:
    yield _peer("keep", _nothing)
    yield _peer("torch save_on_cpu", lambda model: save_on_cpu(pin_memory=True))
    yield Provider("torch checkpoint", partial(_step, around=_nothing, recompute=True))
    yield _peer("torchtune OffloadActivations", _torchtune, "torchtune")
    yield _peer("trl OffloadActivations", _trl, "trl")
    yield Provider("dataeff host", _ours, role="ours")
    yield Provider(f"dataeff auto {SHARE_LEFT:.0%}", _planned, role="ours")
    yield Provider("dataeff disk", partial(_ours, on_disk=True), role="ours")


def _nothing(model: Transformer) -> AbstractContextManager[object]:
    return nullcontext()


def _torchtune(model: Transformer) -> AbstractContextManager[object]:
    made: AbstractContextManager[object] = import_module("torchtune.training").OffloadActivations()
    return made


def _trl(model: Transformer) -> AbstractContextManager[object]:
    # What it is told of the model keeps it from moving the weights and the head's input as well.
    trl = import_module("trl.models.activation_offloading")
    made: AbstractContextManager[object] = trl.get_act_offloading_ctx_manager(model)
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
    # In float32, and without a copy of the gradient: that would be the peak of who saves memory.
    sums = [
        torch.linalg.vector_norm(p.grad, 1, dtype=torch.float32)
        for p in model.parameters()
        if p.grad is not None
    ]
    model.zero_grad(set_to_none=True)
    return loss.detach(), torch.stack(sums)


def _step(inputs: Inputs | None, around: Around, recompute: bool = False) -> Step:
    """A step with everything saved in a context, which is made once, as in training.

    Peers' own would else take a stream, and memory of it, anew at each step.
    """
    model, tokens = _model(inputs)
    assert inputs is not None
    model.recompute = recompute
    context = around(model)

    def metrics() -> Metrics:
        if around is not _nothing or recompute:
            return {}
        return {"peak_saved_bytes": (_kept_bytes(model, tokens, inputs.directory), "bytes")}

    return Step(lambda: _train(model, tokens, context), metrics=metrics)


def _kept_bytes(model: Transformer, tokens: Tensor, directory: Path) -> int:
    """What a step holds for backward at its peak with everything kept."""
    counting = dataeff.ActivationOffload(model, [directory], policy=lambda saved: False)
    _train(model, tokens, counting)
    counting.close()
    return counting.report().peak_saved_bytes


def saved_bytes(shape: Shape) -> int:
    """About what a step saves for backward, in bytes."""
    per_block = SAVED_PER_TOKEN * shape.width * shape.tokens * shape.batch
    return shape.layers * per_block * shape.dtype.itemsize


def _ours(inputs: Inputs | None, on_disk: bool = False, times: int = 1) -> Step:
    model, tokens = _model(inputs)
    assert inputs is not None
    tokens, nbytes = tokens.repeat(times, 1), saved_bytes(inputs.shape) * times
    if on_disk:
        _require_fast_disk(inputs.directory, nbytes)
    # Pinning is slow: half as much again as is likely to be needed. Peers hold pinned memory too,
    # and a host without memory ends the process.
    host_bytes = 0 if on_disk else min(nbytes * 3 // 2, available_bytes() // 2)
    offload = dataeff.ActivationOffload(model, [inputs.directory] if on_disk else None, host_bytes)
    return _offloaded(model, tokens, offload)


def _planned(inputs: Inputs | None) -> Step:
    """Keeps and offloads by a plan, which is made before the clock starts."""
    model, tokens = _model(inputs)
    assert inputs is not None
    if find_spec("scipy") is None:
        raise Unavailable("the package scipy is not installed")
    kept = _kept_bytes(model, tokens, inputs.directory)
    # What is on its way is in both places: more than the share that is not left is moved.
    host_bytes = min(int(1.5 * kept), available_bytes() // 4)
    offload = dataeff.ActivationOffload(
        model, None, host_bytes, policy="auto", memory_budget=SHARE_LEFT * kept
    )
    for _ in range(MOST_STEPS_TO_PLAN):
        if offload.plan is not None:
            break
        _train(model, tokens, offload)
    else:
        offload.close()
        raise Unavailable(f"there was no plan after {MOST_STEPS_TO_PLAN} steps")
    return _offloaded(model, tokens, offload)


def _offloaded(model: Transformer, tokens: Tensor, offload: dataeff.ActivationOffload) -> Step:
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
