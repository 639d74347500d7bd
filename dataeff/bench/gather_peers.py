"""Every way in which others bring rows of a host table to where the index lives.

On a GPU: gathered by the CPU and copied, torch's own kernel over mapped memory, and WholeGraph with
its table in host memory. Without one: torch's gathers on the host, over pages of both sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from dataeff.bench.case import Provider, Step, Unavailable
from dataeff.features.registration import RegisteredMemory
from dataeff.memory.huge_pages import on_huge_pages


@dataclass(frozen=True)
class Inputs:
    """The table, [num_rows, dim] on the host, and index tensors on the device.

    The table stays in the pages it was given: who wants others copies it.
    """

    x: Tensor
    indices: tuple[Tensor, ...]

    def each_call(self, gather: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """`gather` of the next index at every call."""
        turns = cycle(self.indices)
        return lambda: gather(next(turns))

    def buffer(self) -> Tensor:
        """An output, touched, so that no provider pays for the first use of its pages."""
        ids = self.indices[0]
        return torch.zeros(len(ids), self.x.shape[1], device=ids.device)


def to_new_tensors() -> tuple[Provider, ...]:
    """Those that return a tensor of their own at each call; the first defines the result."""
    return (
        Provider("torch.index_select", _index_select),
        Provider("x[index]", _plain_indexing),
        Provider("index_select into pinned memory", _pinned),
        Provider("index_select over mapped memory", _mapped),
        Provider("WholeGraph, host memory", _whole_graph, requires=("pylibwholegraph",)),
    )


def to_a_buffer() -> tuple[Provider, ...]:
    """Those that write into one host tensor again and again; the first defines the result."""
    return (
        Provider("index_select into a buffer", _index_select_out),
        Provider("index_select into a buffer, huge pages", _index_select_huge),
    )


def _index_select(inputs: Inputs) -> Step:
    x = inputs.x
    return Step(inputs.each_call(lambda ids: x.index_select(0, ids.cpu()).to(ids.device)))


def _plain_indexing(inputs: Inputs) -> Step:
    x = inputs.x
    return Step(inputs.each_call(lambda ids: x[ids.cpu()].to(ids.device)))


def _index_select_out(inputs: Inputs) -> Step:
    return _into_a_buffer(inputs, inputs.x)


def _index_select_huge(inputs: Inputs) -> Step:
    return _into_a_buffer(inputs, on_huge_pages(torch.empty_like(inputs.x)).copy_(inputs.x))


def _into_a_buffer(inputs: Inputs, x: Tensor) -> Step:
    out = inputs.buffer()
    return Step(inputs.each_call(lambda ids: torch.index_select(x, 0, ids, out=out)))


def _on_gpu(inputs: Inputs) -> Tensor:
    ids = inputs.indices[0]
    if not ids.is_cuda:
        raise Unavailable("there is no GPU to bring rows to")
    return ids


def _pinned(inputs: Inputs) -> Step:
    staged = torch.empty(len(_on_gpu(inputs)), inputs.x.shape[1], pin_memory=True)

    def gather(ids: Tensor) -> Tensor:
        # The copy has left `staged` before this returns: the next call writes it again.
        torch.index_select(inputs.x, 0, ids.cpu(), out=staged)
        return staged.to(ids.device)

    return Step(inputs.each_call(gather))


class _Mapped:
    """Host memory that CUDA maps, as torch takes arrays of others that lie on a GPU."""

    def __init__(self, x: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape),
            "typestr": "<f4",
            "data": (x.data_ptr(), False),
            "version": 3,
        }


def _mapped(inputs: Inputs) -> Step:
    device = _on_gpu(inputs).device
    memory = RegisteredMemory(inputs.x.clone())
    memory.register(device)
    x = torch.as_tensor(_Mapped(memory.x), device=device)
    return Step(inputs.each_call(lambda ids: x.index_select(0, ids)), close=memory.release)


def _whole_graph(inputs: Inputs) -> Step:
    _on_gpu(inputs)
    import pylibwholegraph.torch as wgth
    from torch._C._distributed_c10d import HashStore

    # It asks for a process group even of one GPU, and some versions leave it when they finish.
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    wgth.init(0, 1, 0, 1, wm_log_level="error")
    group = wgth.comm.get_global_communicator("nccl")
    table = wgth.create_wholememory_tensor(
        group, "continuous", "cpu", list(inputs.x.shape), inputs.x.dtype, None
    )
    rows, _ = table.get_local_tensor(host_view=True)
    rows.copy_(inputs.x)

    def close() -> None:
        wgth.destroy_wholememory_tensor(table)
        wgth.finalize()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    return Step(inputs.each_call(table.gather), close=close)
