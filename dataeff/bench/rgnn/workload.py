"""What every provider is given, and the step it repeats: training or inference of one layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dataeff.bench.case import Step, Unavailable
from dataeff.bench.lane import peak_device_bytes
from dataeff.bench.rgnn.datasets import Edges

Metrics = Callable[[], Mapping[str, tuple[float, str]]]


@dataclass(frozen=True)
class Workload:
    """One layer on one graph.

    Attributes:
        model: the layer's name, `RGCNConv`, `RGATConv` or `HGTConv`.
        nodes, relations, dim: N, R, and D features in and out; one head.
        training: forward, then backward to features and parameters from a gradient of the
            outputs that is given; else forward.
        x: [N, D], on the device that is measured, as all tensors here.
        edges: the graph.
        state: of the layer, under PyTorch Geometric's names.
    """

    model: str
    nodes: int
    relations: int
    dim: int
    training: bool
    x: Tensor
    edges: Edges
    state: dict[str, Tensor]

    @property
    def num_edges(self) -> int:
        """E."""
        return self.edges.edge_type.numel()

    @cached_property
    def tensors_nbytes(self) -> int:
        """Bytes of features, edges, parameters and outputs, and of all their gradients."""
        dense = self._given_nbytes + self.nodes * self.dim * 4
        return dense * (2 if self.training else 1) + self._ids_nbytes

    @property
    def _given_nbytes(self) -> int:
        return self.x.nbytes + sum(p.nbytes for p in self.state.values())

    @property
    def _ids_nbytes(self) -> int:
        return self.edges.edge_index.nbytes + self.edges.edge_type.nbytes

    def step(
        self,
        forward: Callable[[Tensor], Tensor],
        parameters: Mapping[str, Tensor],
        metrics: Metrics | None = None,
        kernels: Sequence[tuple[int, int]] = (),
    ) -> Step:
        """The step of a provider that computes `forward(x)` from these parameters."""
        call: Callable[[], object]
        if self.training:
            call = _training(forward, self.x.detach().requires_grad_(), parameters)
        else:
            call = _inference(forward, self.x)

        def measured() -> Mapping[str, tuple[float, str]]:
            return {**self._memory(call), **(metrics() if metrics else {})}

        nbytes, flops = (
            (sum(amounts) for amounts in zip(*kernels, strict=True)) if kernels else (0, 0)
        )
        return Step(call, metrics=measured, nbytes=nbytes, flops=flops, kernels=kernels)

    def _memory(self, call: Callable[[], object]) -> dict[str, tuple[float, str]]:
        on_gpu = self.x.is_cuda
        peak = peak_device_bytes(call, self.x.device) if on_gpu else peak_host_bytes(call)
        held = self._given_nbytes + self._ids_nbytes
        if self.training:
            held += self.nodes * self.dim * 4  # the gradient that is given
        share = (held + peak) / self.tensors_nbytes if self.tensors_nbytes else 0.0
        found = {"peak_over_tensors": (share, "1")}
        return found if on_gpu else {"peak_host_bytes": (float(peak), "bytes"), **found}


def _training(
    forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Mapping[str, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    leaves = {"x": x, **parameters}
    given: list[Tensor] = []

    def call() -> dict[str, Tensor]:
        y = forward(x)
        if not given:
            given.append(output_gradient(y))
        y.backward(given[0])
        # A parameter of a type without edges may have no gradient, or one of zeros.
        grads = {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in leaves.items()}
        for leaf in leaves.values():  # providers take turns: none keeps what others need
            leaf.grad = None
        return {"y": y.detach()} | grads

    return call


def output_gradient(y: Tensor) -> Tensor:
    """What every provider's backward starts from: random, the same for a shape, of length one.

    A loss on so many outputs would take as long as a layer, and the same in every provider.
    """
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    return drawn.div_(max(y.shape[0], 1) ** 0.5).to(y)


def _inference(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return forward(x)

    return call


def peak_host_bytes(call: Callable[[], object]) -> int:
    """The most host memory that tensors of one call take at once, beyond what was held before.

    Every allocation of torch's CPU allocator is counted, as its profiler reports them; what a
    library takes from `malloc` itself is not.
    """
    from dataeff.memory.scratch import clear_idle

    clear_idle()  # memory that calls of our layers hand on is the step's
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        result = call()
        del result
    found = profiler.profiler
    if found is None or found.kineto_results is None:
        return 0
    events = [e for e in found.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def require_memory(nbytes: int, what: str, device: torch.device | None = None) -> None:
    """Declines work that the free memory of `device`, of the host if None, does not hold.

    Raises:
        Unavailable: `what`, as a part of the sentence, and both numbers.
    """
    if nbytes > 0.8 * (free := available_bytes(device)):
        raise Unavailable(f"{what} {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def available_bytes(device: torch.device | None = None) -> int:
    """Memory of a device that can be had, of the host if None, there without swapping."""
    if device is not None and device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
