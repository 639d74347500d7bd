from pathlib import Path

import pytest
import torch

from dataeff.bench import Unavailable, ceilings


def test_memcpy_copies_all_bytes():
    step = ceilings.memcpy(4097).prepare(None)
    copied = step.call()
    assert step.nbytes == 4097
    assert copied.numel() == 4097 and bool((copied == 1).all())


def test_matmul_counts_two_operations_per_multiply_add():
    step = ceilings.matmul(3, 4, 5, torch.float32, torch.device("cpu")).prepare(None)
    assert step.flops == 2 * 3 * 4 * 5
    assert step.call().shape == (3, 4)


def test_raw_file_reads_what_it_wrote_in_whole_blocks_and_has_no_name(tmp_path):
    try:
        blocks = ceilings.RawFile(tmp_path, ceilings.BLOCK_NBYTES + 1)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert blocks.nbytes == 2 * ceilings.BLOCK_NBYTES and list(tmp_path.iterdir()) == []
    written = [bytes(buffer) for buffer in blocks._buffers[:2]]
    for buffer in blocks._buffers:
        buffer.seek(0)
        buffer.write(bytes(ceilings.BLOCK_NBYTES))
    blocks.read()
    assert [bytes(buffer) for buffer in blocks._buffers[:2]] == written
    blocks.close()


def test_directory_that_cannot_is_unavailable_with_a_reason():
    with pytest.raises(Unavailable, match="/proc"):
        ceilings.RawFile(Path("/proc"), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("ceiling", [ceilings.host_to_device, ceilings.device_copy])
def test_without_a_gpu_its_ceilings_are_unavailable(ceiling):
    with pytest.raises(Unavailable, match="no CUDA device"):
        ceiling(1 << 20).prepare(None)
