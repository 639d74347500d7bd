"""What an offload would need: bandwidth, memory and disk life, before a GPU is rented.

Pure functions of a model's shape and a machine's figures. The bandwidth and life model is that of
SSDTrain (arXiv 2408.10013, section 3); the count of what a layer saves follows Korthikanti et al.
(arXiv 2205.05198, section 4) with a fused attention, which saves no [tokens, tokens] matrix.
Sizes are in bytes, bandwidths in bytes per second, times in seconds; decimal units throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class TransformerShape:
    """A decoder-only transformer.

    Attributes:
        layers: number of blocks.
        hidden: width of the residual stream.
        ffn: width of the MLP between its two (or three, when gated) matrices.
        heads: attention heads.
        kv_heads: heads of keys and values (fewer with grouped queries).
        vocab: size of the vocabulary; embedding and head are separate matrices.
        gated: whether the MLP is `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    gated: bool = True

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def num_parameters(self) -> int:
        """Matrices of all blocks, embedding and head; norms and biases left out."""
        attention = 2 * self.hidden * (self.hidden + self.kv_width)
        mlp = (3 if self.gated else 2) * self.hidden * self.ffn
        return self.layers * (attention + mlp) + 2 * self.vocab * self.hidden


# Llama 3: arXiv 2407.21783, table 3. GPT-3: arXiv 2005.14165, table 2.1.
MODELS = {
    "llama-8b": TransformerShape(32, 4096, 14336, 32, 8, 128256),
    "llama-70b": TransformerShape(80, 8192, 28672, 64, 8, 128256),
    "llama-405b": TransformerShape(126, 16384, 53248, 128, 8, 128256),
    "gpt3-175b": TransformerShape(96, 12288, 49152, 96, 96, 50257, gated=False),
}


def layer_bytes_per_token(shape: TransformerShape, dtype_bytes: int = 2) -> int:
    """Bytes that one block saves for backward per token, each storage counted once.

    Elements: the input of both norms and of the matrices behind them (4 hidden), the queries, keys
    and values (hidden + 2 kv), the output of attention (hidden), and in the MLP the outputs of
    `up` and of the activation (2 ffn), or when gated of `gate`, `up`, activation and product
    (4 ffn). Attention also saves one float32 per head and token.
    """
    mlp = (4 if shape.gated else 2) * shape.ffn
    elements = 6 * shape.hidden + 2 * shape.kv_width + mlp
    return elements * dtype_bytes + 4 * shape.heads


def head_bytes_per_token(shape: TransformerShape, dtype_bytes: int = 2) -> int:
    """Bytes that the last norm, the head and the loss save per token.

    The inputs of norm and head (2 hidden), and the float32 log-probabilities of a cross entropy
    that is not fused with the head (vocab). Backward wants them first, so they stay.
    """
    return 2 * shape.hidden * dtype_bytes + 4 * shape.vocab


def activation_bytes(
    shape: TransformerShape,
    tokens: int,
    *,
    dtype_bytes: int = 2,
    tensor_parallel: int = 1,
    only_layer_inputs: bool = False,
) -> int:
    """Bytes saved for backward on one GPU for `tokens` tokens in all blocks: what can be moved.

    With `tensor_parallel` (and sequence parallelism, so that norms are split too) each of that many
    GPUs holds its share. With `only_layer_inputs` blocks are recomputed and one block at a time is
    whole in memory: what can be moved is the input of each block.
    """
    per_token = (
        shape.hidden * dtype_bytes
        if only_layer_inputs
        else layer_bytes_per_token(shape, dtype_bytes)
    )
    return shape.layers * per_token * tokens // tensor_parallel


def step_flops(shape: TransformerShape, tokens: int, sequence: int, recompute: bool = False) -> int:
    """Operations of a training step over `tokens` tokens in sequences of `sequence`.

    Forward takes 2 per parameter and token, and 2 * layers * hidden * sequence per token for causal
    attention (half of the two products); backward takes twice that, recomputing once more
    (arXiv 2205.05198, appendix A).
    """
    used = shape.num_parameters - shape.vocab * shape.hidden  # looking up embeddings is free
    forward = tokens * (2 * used + 2 * shape.layers * shape.hidden * sequence)
    return forward * (4 if recompute else 3)


def required_write_bandwidth(activations: float, step_s: float) -> float:
    """Bytes per second at which stores hide behind compute: `activations / (step_s / 2)`.

    SSDTrain's model: writes have half of the step, reads the other half.
    """
    return activations / (step_s / 2)


def bytes_per_day(activations: float, step_s: float) -> float:
    """Bytes written per day when every step writes `activations`."""
    return activations / step_s * SECONDS_PER_DAY


@dataclass(frozen=True)
class Disks:
    """The disks that one GPU spills to.

    Attributes:
        count: how many.
        endurance_bytes: rated bytes written over the life of each (its TBW).
        write_bandwidth: sustained bytes per second of each.
        read_bandwidth: the same for reads.
        capacity: bytes of each.
    """

    count: int = 4
    endurance_bytes: float = 600e12
    write_bandwidth: float = 5e9
    read_bandwidth: float = 6.5e9
    capacity: float = 1e12

    @property
    def total_endurance(self) -> float:
        """Rated bytes written of all of them."""
        return self.count * self.endurance_bytes


@dataclass(frozen=True)
class Relaxation:
    """Why disks may outlive their rating under an offload (SSDTrain, section 3).

    Attributes:
        write_amplification: of the rating's workload (JESD 219: 2.5) over that of large sequential
            writes (1).
        retention: more program/erase cycles when data has to last a day and not three years (86).
    """

    write_amplification: float = 2.5
    retention: float = 86.0

    @property
    def factor(self) -> float:
        """By how much the life grows if both hold."""
        return self.write_amplification * self.retention


def life_days(disks: Disks, written_per_day: float, relaxation: Relaxation | None = None) -> float:
    """Days until the endurance is spent: as rated, or with the named factors."""
    if written_per_day <= 0:
        return float("inf")
    factor = 1.0 if relaxation is None else relaxation.factor
    return disks.total_endurance * factor / written_per_day


@dataclass(frozen=True)
class Gpu:
    """One GPU: bytes of memory, dense bf16 operations per second, and the share it reaches."""

    memory: float = 80e9
    flops: float = 989e12
    utilization: float = 0.4


@dataclass(frozen=True)
class CapacityPlan:
    """What one GPU of the job needs, per microbatch step, and for how long the disks last.

    Attributes:
        activations: bytes that the blocks save for backward and that can be moved.
        kept: bytes saved that stay: of the head, whose backward comes first, and where blocks are
            recomputed of one block.
        states: bytes of parameters, gradients and Adam states (16 per parameter, sharded).
        memory: bytes of the GPU.
        step_s: seconds of forward and backward.
        write_bandwidth: bytes per second needed so that stores hide behind compute.
        disk_bandwidth: what the disks sustain.
        written_per_day: bytes a day if everything that does not fit is written.
        excess: bytes of `activations` that the GPU's memory does not hold: what is offloaded.
        disk_capacity: bytes of the disks.
        rated_life_days: until the rated endurance is spent.
        relaxed_life_days: with both factors of `Relaxation`.
    """

    activations: float
    kept: float
    states: float
    memory: float
    step_s: float
    write_bandwidth: float
    disk_bandwidth: float
    written_per_day: float
    excess: float
    disk_capacity: float
    rated_life_days: float
    relaxed_life_days: float

    @property
    def fits_without(self) -> bool:
        """Whether nothing need be offloaded."""
        return self.excess <= 0

    @property
    def hides(self) -> bool:
        """Whether the disks are fast enough for what does not fit."""
        return self.write_bandwidth <= self.disk_bandwidth

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.states + self.kept >= self.memory and self.states + self.kept > 0:
            return (
                "Parameters, optimizer states and what must stay for backward exceed the GPU: "
                "shard over more GPUs, or take fewer tokens."
            )
        if self.fits_without:
            return "Everything fits: do not offload."
        if self.excess > self.disk_capacity:
            return "The disks are too small for it: recompute, add disks, or take fewer tokens."
        if not self.hides:
            return "The disks are too slow to hide it: recompute, add disks, or use host memory."
        return f"Offload {self.excess / 1e9:.3g} GB per step; the transfers hide behind compute."


def plan_capacity(
    shape: TransformerShape,
    *,
    num_gpus: int,
    microbatch: int = 1,
    sequence: int = 8192,
    tensor_parallel: int = 1,
    only_layer_inputs: bool = False,
    gpu: Gpu | None = None,
    disks: Disks | None = None,
) -> CapacityPlan:
    """Plans for one GPU of `num_gpus` that shard parameters and optimizer states among them all.

    Args:
        shape: the model.
        num_gpus: GPUs of the job.
        microbatch: sequences per forward and backward of one tensor-parallel group.
        sequence: tokens per sequence.
        tensor_parallel: GPUs that share one microbatch.
        only_layer_inputs: recompute blocks and offload only their inputs.
        gpu: one GPU.
        disks: the disks of one GPU.

    Raises:
        ValueError: `num_gpus` is no multiple of `tensor_parallel`, a size is not positive, or the
            GPU reaches more than all of its rate.
    """
    if min(num_gpus, microbatch, sequence, tensor_parallel) < 1:
        raise ValueError(
            f"num_gpus={num_gpus}, microbatch={microbatch}, sequence={sequence} and "
            f"tensor_parallel={tensor_parallel} must be positive"
        )
    if num_gpus % tensor_parallel:
        raise ValueError(f"num_gpus={num_gpus} is no multiple of tensor_parallel={tensor_parallel}")
    gpu, disks = gpu or Gpu(), disks or Disks()
    if not 0 < gpu.utilization <= 1:
        raise ValueError(f"utilization={gpu.utilization} is no share of the rate: 0 to 1")
    tokens = microbatch * sequence
    activations = activation_bytes(
        shape, tokens, tensor_parallel=tensor_parallel, only_layer_inputs=only_layer_inputs
    )
    kept = head_bytes_per_token(shape) * tokens // tensor_parallel
    if only_layer_inputs:
        kept += activation_bytes(shape, tokens, tensor_parallel=tensor_parallel) // shape.layers
    flops = step_flops(shape, tokens, sequence, recompute=only_layer_inputs) / tensor_parallel
    states = 16 * shape.num_parameters / num_gpus
    step_s = flops / (gpu.flops * gpu.utilization)
    return _plan(activations, kept, step_s, states, gpu.memory, disks)


def plan_from_measurement(
    bytes_per_step: float,
    step_s: float,
    *,
    disks: Disks | None = None,
) -> CapacityPlan:
    """The same with what a run measured: all of `bytes_per_step` is offloaded every `step_s`."""
    return _plan(bytes_per_step, 0.0, step_s, 0.0, 0.0, disks or Disks())


def _plan(
    activations: float,
    kept: float,
    step_s: float,
    states: float,
    memory: float,
    disks: Disks,
) -> CapacityPlan:
    excess = max(0.0, min(activations, activations + kept + states - memory))
    daily = bytes_per_day(excess, step_s)
    return CapacityPlan(
        activations=activations,
        kept=kept,
        states=states,
        memory=memory,
        step_s=step_s,
        write_bandwidth=required_write_bandwidth(excess, step_s),
        disk_bandwidth=disks.count * min(disks.write_bandwidth, disks.read_bandwidth),
        written_per_day=daily,
        excess=excess,
        disk_capacity=disks.count * disks.capacity,
        rated_life_days=life_days(disks, daily),
        relaxed_life_days=life_days(disks, daily, Relaxation()),
    )
