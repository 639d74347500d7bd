"""Operations of a device on unified tensors, proven on the CPU over an alias made as a GPU's is."""

import pytest
import torch
import torch.nn.functional as F

import dataeff
from dataeff.features import UnifiedTensor, unified_memory, unified_tensor
from dataeff.features.unified_memory import DLPACK_CPU, byte_alias

META = torch.device("meta")  # stands for the GPU
INDEX = torch.tensor([3, 0, 3])


@pytest.fixture
def x():
    return torch.arange(24.0).view(6, 4)


@pytest.fixture
def emulated(monkeypatch):
    """Operations go the way of the GPU; the alias is of the CPU but made as a GPU's is."""

    def alias(self, x, device):
        return byte_alias(x, DLPACK_CPU, 0, self.registered) if x.numel() else x

    monkeypatch.setattr(unified_tensor, "placement", lambda operands, propagate: META)
    monkeypatch.setattr(unified_memory.UnifiedMemory, "alias", alias)


OPERATIONS = [
    lambda u: u + torch.ones(4),
    lambda u: u[1:, ::2] * 2,
    lambda u: u.t() @ torch.ones(6, 3),
    lambda u: torch.cat([u, u.flip(0)]),
    lambda u: u[torch.tensor([5, -6])].sum(0),
    lambda u: u.topk(2, dim=0).values,
    lambda u: torch.index_select(u, 1, INDEX),
    lambda u: F.softmax(u, dim=1),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=range(len(OPERATIONS)))
def test_values_and_gradients_through_the_alias(emulated, operation):
    x = torch.rand(6, 4, requires_grad=True)
    u = dataeff.unified(x.detach().clone().requires_grad_())
    expected, result = operation(x), operation(u)
    assert torch.equal(result, expected) and not isinstance(result, UnifiedTensor)
    weights = torch.rand(expected.shape)
    (expected * weights).sum().backward()
    (result * weights).sum().backward()
    assert u.grad.device.type == "cpu" and torch.equal(u.grad, x.grad)


def test_writes_through_the_alias(emulated, x):
    u, plain = dataeff.unified(x), x.clone()
    version = u._version
    assert u.add_(torch.ones(4)) is u
    u[INDEX] = torch.zeros(3, 4)
    torch.mul(u, 2, out=u)
    plain = plain.add_(1).index_fill_(0, INDEX, 0).mul_(2)
    assert torch.equal(x, plain) and u._version > version


def test_a_result_on_the_device_never_aliases_host_memory(emulated, x):
    u = dataeff.unified(x)
    result = u.to(torch.float32)
    result.fill_(0)
    assert x.sum() == sum(range(24))


def test_a_leaf_with_gradients_is_not_written_from_the_device(x):
    u = dataeff.unified(x.requires_grad_())
    with pytest.raises(RuntimeError, match="no_grad"):
        u.add_(torch.zeros(4, device=META))
    with torch.no_grad():
        assert u.add_(torch.zeros(4, device=META)) is u
