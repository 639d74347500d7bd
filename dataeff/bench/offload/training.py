"""A training step of a GPT, and everybody who can hold its activations.

Every provider starts from the same weights and takes the same SGD steps; what its first step leaves
in the parameters must be the bits that keeping leaves, and after 20 steps the disk's are compared
again. `peak_saved_bytes` is what was held for backward at once (`OffloadReport`); for peers it is
counted by an offload that moves nothing, in one untimed step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

import dataeff
from dataeff.bench.case import Case, Options, Provider, Step
from dataeff.bench.folder import new_folder
from dataeff.bench.offload.model import VOCABULARY, Shape, Transformer

NUM_COMPARED_STEPS = 20
Metrics = dict[str, tuple[float, str]]


@dataclass
class Training:
    """A model and the steps it has taken.

    Attributes:
        cpu_s: processor seconds of all threads, summed over the steps.
    """

    model: Transformer
    tokens: Tensor
    num_steps: int = 0
    cpu_s: float = 0.0

    def step(self, around: AbstractContextManager[object]) -> list[Tensor]:
        """One SGD step; returns the parameters."""
        start_s = time.process_time()
        with around:
            self.model(self.tokens).backward()
        with torch.no_grad():
            for p in self.model.parameters():
                assert p.grad is not None
                p.sub_(p.grad, alpha=1e-3)
                p.grad = None
        self.num_steps += 1
        self.cpu_s += time.process_time() - start_s
        return list(self.model.parameters())

    @property
    def cpu_per_step(self) -> tuple[float, str]:
        """Processor time of a step: what a loaded machine disturbs less than elapsed time."""
        return self.cpu_s / max(1, self.num_steps), "s"


@dataclass
class Inputs:
    """What all providers share: weights, a batch, a place to spill to.

    Attributes:
        kept: the training that keeps everything, for a comparison at the end.
    """

    shape: Shape
    weights: dict[str, Tensor]
    tokens: Tensor
    directory: Path
    kept: list[Training] = field(default_factory=list)

    def training(self) -> Training:
        """A model of its own, at the shared weights."""
        model = Transformer(self.shape).to(self.tokens.device, self.shape.dtype)
        model.load_state_dict(self.weights)
        return Training(model, self.tokens)


def cases(options: Options) -> Iterator[Case]:
    """A small model beside all peers, a middle one, and a large one beside keeping it all.

    On two idle cores of a server: about a minute, a minute and a half, and ten to seventeen.
    """
    small, middle, large = Shape(4, 256, 4, 128), Shape(8, 512, 8, 256), Shape(12, 768, 8, 512)
    moved = Provider("dataeff disk", partial(disk, compared=True), role="ours")
    # An overhead of 1 % is less than what two runs of the same step differ by on a shared machine:
    # many short steps, and keeping once more shows what the ratios are worth.
    for name, shape, num_calls in options.pick(
        full=(("small", small, 60), ("middle", middle, None)), quick=(("small", small, None),)
    ):
        yield Case(
            size=f"{name} step: {shape}",
            group=f"a {name} GPT",
            inputs=partial(make_inputs, shape, options),
            num_calls=num_calls,
            budget_s=15.0,
            providers=(
                Provider("keep", keep),
                Provider("keep again", keep),
                Provider("torch save_on_cpu", on_cpu),
                Provider("torch checkpoint", recompute),
                Provider("dataeff with nothing to offload", nothing, role="ours"),
                Provider("dataeff whose callable keeps all", asking, role="ours"),
                moved if shape is small else Provider("dataeff disk", disk, role="ours"),
            ),
        )
    if not options.quick:
        # Ten seconds a step on a CPU: each of the 20 that the weights are compared after is timed.
        yield Case(
            size=f"large step: {large}",
            group="GPT of 12 layers, 768 wide",
            inputs=partial(make_inputs, large, options),
            providers=(Provider("keep", keep), moved),
            num_calls=NUM_COMPARED_STEPS,
        )


def make_inputs(shape: Shape, options: Options) -> Inputs:
    """Weights and a batch on the device of `options`."""
    model = Transformer(shape).to(options.device, shape.dtype)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(VOCABULARY, (shape.batch, shape.tokens), device=options.device)
    return Inputs(shape, weights, tokens, options.directory)


def peak_of(training: Training, directory: Path) -> int:
    """Bytes that one step holds for backward at once, when nothing is moved."""
    counting = dataeff.ActivationOffload(
        training.model, [directory], policy=lambda saved: False, min_bytes=0
    )
    training.step(counting)
    counting.close()
    return counting.report().peak_saved_bytes


def keep(inputs: Inputs) -> Step:
    """Plain PyTorch."""
    training = inputs.training()
    inputs.kept.append(training)

    def metrics() -> Metrics:
        cpu = training.cpu_per_step
        peak = peak_of(training, inputs.directory)
        return {"cpu_s": cpu, "peak_saved_bytes": (peak, "bytes")}

    return Step(lambda: training.step(nullcontext()), metrics=metrics)


def on_cpu(inputs: Inputs) -> Step:
    """PyTorch's own offload to host memory; on a CPU it moves nothing and copies."""
    training, pin = inputs.training(), inputs.tokens.is_cuda
    return Step(
        lambda: training.step(save_on_cpu(pin_memory=pin)),
        metrics=lambda: {"cpu_s": training.cpu_per_step},
    )


def recompute(inputs: Inputs) -> Step:
    """Every block under `torch.utils.checkpoint`."""
    training = inputs.training()
    training.model.recompute = True

    def metrics() -> Metrics:
        cpu = training.cpu_per_step
        # The hooks of the count see the inputs of blocks, not what a block saves when it runs
        # again in backward: one block at a time is whole in memory beside them.
        peak = peak_of(training, inputs.directory) + _block_bytes(inputs, training.model)
        return {"cpu_s": cpu, "peak_saved_bytes": (peak, "bytes")}

    return Step(lambda: training.step(nullcontext()), metrics=metrics)


def _block_bytes(inputs: Inputs, model: Transformer) -> int:
    shape, block = inputs.shape, model.blocks[-1]
    x = torch.zeros(
        *(shape.batch, shape.tokens, shape.width),
        device=inputs.tokens.device, dtype=shape.dtype, requires_grad=True,
    )  # fmt: skip
    counting = dataeff.ActivationOffload(
        block, [inputs.directory], policy=lambda saved: False, min_bytes=0
    )
    with counting:
        block(*((x, x) if block.cross is not None else (x,))).sum().backward()
    model.zero_grad(set_to_none=True)
    counting.close()
    return counting.report().peak_saved_bytes


def nothing(inputs: Inputs) -> Step:
    """An offload for which every storage is too small: it soon leaves its hooks away."""
    return offloaded(inputs, min_bytes=1 << 40)


def asking(inputs: Inputs) -> Step:
    """An offload that has to ask about every storage: it soon asks when the model is called."""
    return offloaded(inputs, policy=lambda saved: False)


def disk(inputs: Inputs, *, compared: bool = False, directories: int = 1, **options: Any) -> Step:
    """Everything that is worth it goes to files in `directories` folders."""
    return offloaded(inputs, compared=compared, directories=directories, **options)


def offloaded(
    inputs: Inputs,
    *,
    compared: bool = False,
    directories: int = 1,
    more: Callable[[dataeff.ActivationOffload], Metrics] = lambda offload: {},
    first: Callable[[Training, dataeff.ActivationOffload], None] = lambda training, offload: None,
    **options: Any,
) -> Step:
    """A step under an `ActivationOffload` with these options.

    Args:
        inputs: what all share.
        compared: compare the weights after 20 steps with those of keeping.
        directories: how many folders to spill to.
        more: further figures.
        first: takes steps before the clock starts; their effect on the weights is taken back.
        options: of the offload.
    """
    training = inputs.training()
    options = {"min_bytes": 1 << 18, **options}
    with ExitStack() as made:
        folders = [new_folder(inputs.directory, made) for _ in range(directories)]
        offload = dataeff.ActivationOffload(training.model, folders, **options)
        made.callback(offload.close)
        first(training, offload)
        close = made.pop_all().close
    training.model.load_state_dict(inputs.weights)
    training.num_steps, training.cpu_s = 0, 0.0

    def metrics() -> Metrics:
        report = offload.report()
        steps = max(1, report.num_steps)
        found: Metrics = {
            "cpu_s": training.cpu_per_step,
            "peak_saved_bytes": (report.peak_saved_bytes, "bytes"),
            "bytes_written_per_step": (report.bytes_written / steps, "bytes"),
            "exposed_wait_per_step": (report.exposed_wait_s / steps, "s"),
            **more(offload),
        }
        if compared:
            same = _same_weights(inputs.kept[0], training, offload)
            found[f"identical_after_{NUM_COMPARED_STEPS}_steps"] = (float(same), "1")
        return found

    return Step(lambda: training.step(offload), close=close, metrics=metrics)


def _same_weights(kept: Training, moved: Training, offload: AbstractContextManager[object]) -> bool:
    """Takes both on to the same step, the 20th or later, and compares every weight's bits."""
    last = max(NUM_COMPARED_STEPS, kept.num_steps, moved.num_steps)
    for training, around in ((kept, nullcontext()), (moved, offload)):
        while training.num_steps < last:
            training.step(around)
    pairs = zip(kept.model.parameters(), moved.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
