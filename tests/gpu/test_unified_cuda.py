"""Unified tensors and learnable host rows on CUDA: the memory itself, and PyTorch's own values."""

import gc

import pytest
import torch
import torch.nn.functional as F

import dataeff
from dataeff import _core
from dataeff.features import UnifiedTensor

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _core.cuda_built), reason="needs a CUDA GPU and CUDA build"
)
INDEX = torch.tensor([3, 0, 3])


@pytest.fixture
def x():
    return torch.randn(600, 33)


OPERATIONS = {
    "getitem": lambda u, i: u[i],
    "index_select": lambda u, i: u.index_select(0, i),
    "index_select dim 1": lambda u, i: torch.index_select(u, 1, i),
    "embedding": lambda u, i: F.embedding(i, u),
    "gather": lambda u, i: torch.gather(u, 0, i[:, None].expand(3, 33)),
    "columns": lambda u, i: u[:, i],
    "arithmetic": lambda u, i: u * i.sum() + 1,
    "matmul": lambda u, i: u.t()[:, :3].t() @ i.new_ones(33, 2).float(),
    "cat": lambda u, i: torch.cat([u[:2], i.new_zeros(1, 33).float()]),
    "half": lambda u, i: u.to(i.device).half(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_are_those_of_a_tensor_on_the_gpu(x, name):
    operation = OPERATIONS[name]
    result = operation(dataeff.unified(x), INDEX.cuda())
    assert result.device.type == "cuda" and not isinstance(result, UnifiedTensor)
    torch.testing.assert_close(result, operation(x.cuda(), INDEX.cuda()))


@pytest.mark.parametrize("name", ["getitem", "embedding", "gather", "columns", "arithmetic"])
def test_gradients_come_home(x, name):
    operation = OPERATIONS[name]
    u = dataeff.unified(x.clone().requires_grad_())
    plain = x.cuda().requires_grad_()
    for weight in (u, plain):
        operation(weight, INDEX.cuda()).square().sum().backward()
    assert u.grad.device.type == "cpu"
    torch.testing.assert_close(u.grad, plain.grad.cpu())


def test_alone_it_runs_where_it_was_told_to(x):
    assert dataeff.unified(x).sum().device.type == "cpu"
    u = dataeff.unified(x, propagate=True)
    assert u.sum().device.type == "cuda"
    assert (u + torch.ones(33)).device.type == "cpu"
    torch.testing.assert_close((u @ u.t()).cpu(), x @ x.t(), atol=1e-3, rtol=1e-3)


def test_writes_of_the_gpu_are_read_by_the_cpu(x):
    u, y = dataeff.unified(x), torch.randn(600, 33, device="cuda")
    expected = x + y.cpu()
    for _ in range(5):
        assert u.add_(y) is u
    u.sub_(y * 4)
    torch.testing.assert_close(u.cpu(), expected, atol=1e-4, rtol=1e-4)  # waits for the GPU
    u[torch.tensor([5, 7], device="cuda")] = y[:2]
    u.synchronize()
    assert torch.equal(x[[5, 7]], y[:2].cpu())


def test_the_cpu_writes_after_what_the_gpu_reads(x):
    u = dataeff.unified(x)
    index = torch.arange(600, device="cuda")
    before = x.clone()
    torch.rand(2048, 2048, device="cuda") @ torch.rand(2048, 2048, device="cuda")
    rows = u[index]
    u.zero_()
    assert torch.equal(rows.cpu(), before) and not x.any()


WRITES = {
    "by the CPU": lambda u: u.zero_(),
    "by the CPU, in part": lambda u: u[3].fill_(1),
    "by the GPU": lambda u: u.add_(torch.ones(33, device="cuda")),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("learns", [False, True])
def test_what_autograd_has_saved_must_not_be_written(x, write, learns):
    """As of any tensor: a gradient of other values than the forward's would be wrong in silence."""
    u = dataeff.unified(x.requires_grad_(learns))
    h = torch.randn(5, 33, device="cuda", requires_grad=True)
    y = F.linear(h, u)
    with torch.no_grad():
        WRITES[write](u)
    with pytest.raises(RuntimeError, match=r"modified .*in-?place"):
        y.sum().backward()
    F.linear(h, u).sum().backward()
    expected = u.detach().cpu().sum(0).expand(5, 33)
    torch.testing.assert_close(h.grad.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_an_alias_outlives_the_tensor(x):
    expected = (x * 2).cuda()
    u = dataeff.unified(x)
    result = u * torch.tensor(2.0, device="cuda")
    del u, x
    gc.collect()
    torch.testing.assert_close(result, expected)
    torch.cuda.synchronize()


def test_compiles_as_one_graph(x):
    u = dataeff.unified(x).register()

    def step(u, index, y):
        return u[index].relu() + u[:3] * y

    index, y = INDEX.cuda(), torch.randn(33, device="cuda")
    expected = x.cuda()[index].relu() + x.cuda()[:3] * y
    compiled = torch.compile(lambda u, i: u[i].relu(), fullgraph=True)
    torch.testing.assert_close(compiled(u, index), x.cuda()[index].relu())
    torch.testing.assert_close(step(u, index, y), expected)


def test_captured_in_a_graph(x):
    u = dataeff.unified(x).register()
    index = INDEX.cuda()
    u[index]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = u[index]
    index.add_(1)
    graph.replay()
    assert torch.equal(rows.cpu(), x[INDEX + 1])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_host_rows_train_as_rows_on_the_gpu(name):
    torch.manual_seed(0)
    host = dataeff.HostEmbedding(50, 16, padding_idx=1)
    plain = torch.nn.Embedding(50, 16, padding_idx=1, sparse=True)
    plain.load_state_dict(host.state_dict())
    model = torch.nn.ModuleDict({"host": host, "plain": plain}).cuda()
    assert model["host"].weight.device.type == "cpu"
    for module in model.values():
        torch.manual_seed(1)
        optimizer = getattr(torch.optim, name)(list(module.parameters()), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            index = torch.randint(50, (200,)).cuda()
            module(index).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(host.weight, plain.weight.cpu(), atol=1e-4, rtol=1e-4)


def test_gradients_of_host_rows_are_the_same_bits_every_time():
    index = torch.randint(20, (5000,), device="cuda")
    host, found = dataeff.HostEmbedding(20, 32), []
    weights = torch.randn(5000, 32, device="cuda")
    for _ in range(3):
        host.weight.grad = None
        (host(index) * weights).sum().backward()
        found.append(host.weight.grad.to_dense())
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_wrong_index_has_no_gradient_and_harms_nobody():
    host = dataeff.HostEmbedding(50, 16)
    rows = host(torch.tensor([3, 50, -1], device="cuda"))
    assert not rows[1].any() and torch.equal(rows[2].cpu(), host.weight[49])
    with pytest.raises(IndexError, match=r"50|wrong indices"):
        rows.sum().backward()
    with pytest.raises(IndexError, match="1 wrong indices"):
        host(torch.tensor([0], device="cuda"))
    assert torch.equal(host(torch.tensor([4], device="cuda")).cpu(), host.weight[4:5])
