"""How many blocks of threads the CUDA gather needs to fill the bus; fewer leave the GPU to others.

The gather takes the fewest that should keep enough bytes on their way, by the numbers of common
machines (`csrc/gather/gather.cu`). This shows whether they are right for the one at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dataeff import _core
from dataeff._ops import row_table
from dataeff.bench import ceilings
from dataeff.bench.case import Case, Options, Provider, Step
from dataeff.bench.gather_peers import Inputs, to_new_tensors
from dataeff.features.gather_cuda import bad_indices
from dataeff.features.registration import RegisteredMemory

NUM_BLOCKS = (0, 4, 8, 16, 32, 64, 128)
NUM_INDICES = 8


def cases(options: Options) -> Iterator[Case]:
    """Rows of 64, 512 and 4096 bytes by more and more blocks; on a GPU alone.

    And rows of 512 bytes of which the first tenth is hot and asked for by a power law: more bytes
    have to be under way then, since only some of them cross the bus.
    """
    if options.device.type != "cuda":
        return
    table_nbytes, out_nbytes = options.pick(full=(1 << 30, 1 << 26), quick=(1 << 28, 1 << 24))
    cold = options.pick(full=(64, 512, 4096), quick=(512,))
    for row_nbytes, is_hot in (*((n, False) for n in cold), (512, True)):
        num_rows, num_ids = table_nbytes // row_nbytes, out_nbytes // row_nbytes
        yield Case(
            size=f"blocks rows={num_rows} dim={row_nbytes // 4} ids={num_ids} f32"
            + (" a tenth hot" if is_hot else ""),
            group="blocks of the CUDA gather",
            inputs=partial(_inputs, num_rows, row_nbytes // 4, num_ids, options.device, is_hot),
            providers=(
                to_new_tensors()[0],
                *(
                    Provider(
                        f"dataeff {n or 'usual'} blocks", partial(_ours, n, is_hot), role="ours"
                    )
                    for n in NUM_BLOCKS
                ),
            ),
            ceilings=(ceilings.host_to_device(out_nbytes),),
            nbytes=out_nbytes,
        )


def _inputs(
    num_rows: int, dim: int, num_ids: int, device: torch.device, by_power_law: bool
) -> Inputs:
    def draw() -> Tensor:
        if not by_power_law:
            return torch.randint(num_rows, (num_ids,)).to(device)
        ranks = num_rows ** torch.rand(num_ids, dtype=torch.float64)  # rank r about as r^-1
        return (ranks.long().clamp_(max=num_rows) - 1).to(device)

    return Inputs(torch.randn(num_rows, dim), tuple(draw() for _ in range(NUM_INDICES)))


def _ours(num_blocks: int, is_hot: bool, inputs: Inputs) -> Step:
    device = inputs.indices[0].device
    hot = inputs.x[: len(inputs.x) // 10 if is_hot else 0].to(device)
    memory, out, bad = RegisteredMemory(inputs.x), inputs.buffer(), bad_indices(device)
    memory.register(device)

    def gather(ids: Tensor) -> Tensor:
        _core.gather_cuda(
            *row_table(inputs.x),
            ids.data_ptr(),
            ids.numel(),
            ids.element_size(),
            out.data_ptr(),
            bad.count.data_ptr(),
            bad.seen.data_ptr(),
            device.index,
            torch.cuda.current_stream(device).cuda_stream,
            num_blocks=num_blocks,
            hot=hot.data_ptr(),
            hot_rows=hot.shape[0],
            hot_stride=hot.stride(0) * hot.element_size(),
        )
        return out

    return Step(inputs.each_call(gather), close=memory.release)
