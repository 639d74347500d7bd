"""Under Accelerate the plain `with offload:` is all that is needed."""

import pytest
import torch
from torch import nn

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("default")  # the library's own warnings are its own


def train(make_offload):
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    data = torch.utils.data.DataLoader(torch.randn(256, 64), batch_size=64)
    model, optimizer, data = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data
    )
    offload = make_offload(model)
    for batch in data:
        with accelerator.accumulate(model), offload:
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model).state_dict(), offload


def test_gives_the_same_weights(tmp_path):
    from dataeff.offload import ActivationOffload

    def keep(model):
        return ActivationOffload(model, tmp_path, policy=lambda info: False)

    expected, kept = train(keep)
    got, offload = train(lambda model: ActivationOffload(model, tmp_path, min_bytes=0))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert kept.report().bytes_written == 0
    offload.close()  # a write that nobody wants any more may still be under way
    assert offload.report().bytes_written > 0 and offload.report().saved_bytes == 0
