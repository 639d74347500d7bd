"""The benchmark of the CUDA gather's blocks, listed without a GPU and run with one."""

import pytest
import torch

from dataeff import _core
from dataeff.bench import Options, gather, run_case
from dataeff.bench.gather_blocks import NUM_BLOCKS, cases
from dataeff.bench.record import Run

CUDA = torch.device("cuda")


def test_only_a_gpu_has_blocks():
    assert not list(cases(Options(device=torch.device("cpu"))))
    listed = [one.size for one in gather.cases(Options(device=CUDA, quick=True))]
    found = list(cases(Options(device=CUDA, quick=True)))
    assert ["hot" in case.size for case in found] == [False, True]
    for case in found:
        assert sum(provider.role == "ours" for provider in case.providers) == len(NUM_BLOCKS)
        assert case.size in listed


@pytest.mark.skipif(
    not (torch.cuda.is_available() and _core.cuda_built), reason="needs a CUDA GPU and CUDA build"
)
def test_all_numbers_of_blocks_agree_cuda():
    options = Options(device=CUDA, quick=True)
    for case in cases(options):
        run_case("gather", case, options, Run.here(CUDA))
