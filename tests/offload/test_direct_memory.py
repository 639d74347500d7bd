"""A device that has no memory left, where cuFile moves what is on it."""

import pytest
import torch
from torch import nn

from dataeff.offload import ActivationOffload


@pytest.mark.parametrize("host_bytes", [0, 1 << 20])
def test_what_would_take_memory_to_move_stays_or_goes_to_the_host_tier(
    fake_cufile, late_streams, monkeypatch, gradients, assert_same, tmp_path, host_bytes
):
    """The bytes behind the last whole block of a file are kept as a clone."""
    for module in ("cufile", "engine"):
        name = f"dataeff.storage.{module}.cufile_library"
        monkeypatch.setattr(name, lambda: fake_cufile.path)
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Linear(100, 100) for _ in range(4)]), torch.randn(100, 100)
    expected = gradients(model, lambda: model(x).square().mean().backward())
    clone = torch.Tensor.clone

    def scarce(tensor):
        if tensor.dtype is torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", scarce)
    offload = ActivationOffload(
        model, tmp_path, host_bytes, lambda info: "disk", min_bytes=0, engine="cufile",
        streams_of=lambda device: late_streams,
    )  # fmt: skip

    def step():
        with offload:
            model(x).square().mean().backward()

    if host_bytes:
        assert_same(gradients(model, step), expected)
    else:
        with pytest.warns(RuntimeWarning, match="no memory for what fills no whole block"):
            assert_same(gradients(model, step), expected)
    offload._cache.drain()
    report = offload.report()
    assert report.bytes_written == report.saved_bytes == offload._tiers.disk_nbytes == 0
    moved = report.bytes_host + report.bytes_cancelled if host_bytes else report.bytes_failed
    assert moved == 4 * 40_000
    offload.close()
