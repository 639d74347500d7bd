"""A model compiled whole with `compile_backend`: values leave and come back one by one."""

import gc
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dataeff.offload import ActivationOffload, compile_backend, tickets
from dataeff.offload.compiled import Partitioner

NBYTES = 512 * 64 * 4


def as_traced(graph, inputs):
    return make_boxed_func(graph.forward)


eager = aot_autograd(fw_compiler=as_traced, partition_fn=Partitioner())


class Chain(nn.Module):
    def __init__(self, depth=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).sin()
        return x.square().mean()


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def chain(device):
    torch.manual_seed(0)
    return Chain().to(device), torch.randn(512, 64).to(device)


def step(model, x, offload=None):
    model.zero_grad()
    if offload is None:
        model(x).backward()
    else:
        with offload:
            loss = model(x)
            offload._cache.drain()
            loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def held_at_once(report, x):
    """Where the model is; of a CPU also what goes to disk has no other place."""
    return report.peak_saved_bytes if x.device.type == "cpu" else report.peak_held_bytes


def test_a_whole_model_has_one_value_in_memory_at_a_time(chain, tmp_path, assert_same):
    model, x = chain
    whole = torch.compile(model, backend=eager)
    expected = step(model, x)
    offload = ActivationOffload(
        whole, tmp_path, min_bytes=0, in_flight_bytes=NBYTES, prefetch_bytes=0
    )
    for _ in range(3):
        assert_same(step(whole, x, offload), expected)
    report = offload.report()
    assert report.bytes_written >= 3 * 5 * NBYTES
    assert held_at_once(report, x) <= 3 * NBYTES
    assert report.saved_bytes == 0
    offload.close()
    assert_same(step(whole, x), expected)  # without an offload they are kept
    gc.collect()
    assert not tickets._left


def test_inductor_compiles_the_whole_with_the_same_bits(chain, tmp_path, assert_same):
    model, x = chain
    expected = step(torch.compile(model), x)
    torch._dynamo.reset()
    whole = torch.compile(model, backend=compile_backend)
    offload = ActivationOffload(
        whole, tmp_path, min_bytes=0, in_flight_bytes=NBYTES, prefetch_bytes=0
    )
    for _ in range(2):
        assert_same(step(whole, x, offload), expected)
    report = offload.report()
    assert report.bytes_written >= 2 * 5 * NBYTES and held_at_once(report, x) <= 3 * NBYTES
    offload.close()


class Sliced(nn.Module):
    """Saves what begins in the middle of a row of another value, as wide as `gaps` says."""

    def __init__(self, gaps):
        super().__init__()
        self.gaps, self.up, self.down = gaps, nn.Linear(64, 257), nn.Linear(256, 64)

    def forward(self, x):
        h = self.up(x)
        h = h[:, 1:] if self.gaps else h.flatten()[1 : 1 + 512 * 256].unflatten(0, (512, 256))
        return self.down(h.sin()).square().mean()


@pytest.mark.parametrize("gaps", [False, True])
def test_a_value_that_begins_at_an_odd_address_is_moved_too(tmp_path, device, assert_same, gaps):
    torch.manual_seed(0)
    model, x = Sliced(gaps).to(device), torch.randn(512, 64).to(device)
    expected = step(torch.compile(model), x)
    torch._dynamo.reset()
    whole = torch.compile(model, backend=compile_backend)
    assert_same(step(whole, x), expected)
    offload = ActivationOffload(whole, tmp_path, min_bytes=0)
    assert_same(step(whole, x, offload), expected)
    assert offload.report().bytes_written >= 512 * 256 * 4
    offload.close()


def test_inputs_of_another_length_are_moved_too(chain, tmp_path, assert_same):
    model, like = chain
    whole = torch.compile(model, backend=eager, dynamic=True)
    offload = ActivationOffload(whole, tmp_path, min_bytes=0)
    for length in (512, 384, 640):
        x = torch.randn(2, length, 64).to(like.device)
        before = offload.report().bytes_packed
        assert_same(step(whole, x, offload), step(model, x))
        assert offload.report().bytes_packed - before >= 5 * x.nbytes
    offload.close()


def test_a_graph_is_gone_back_twice_and_let_go(chain, tmp_path, assert_same):
    model, x = chain
    whole = torch.compile(model, backend=eager)
    expected = step(model, x)
    with ActivationOffload(whole, tmp_path, min_bytes=0) as offload:
        loss = whole(x)
        offload._cache.drain()
        for _ in range(2):
            assert_same(
                torch.autograd.grad(loss, list(model.parameters()), retain_graph=True), expected
            )
        del loss
    gc.collect()
    assert not tickets._left
    assert offload.report().saved_bytes == 0
    offload.close()


def test_results_and_inputs_are_left_alone(tmp_path, device):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            y = x @ self.weight
            return y, y.sin()

    model = Two().to(device)
    whole = torch.compile(model, backend=eager)
    with ActivationOffload(whole, tmp_path, min_bytes=0) as offload:
        y, z = whole(torch.randn(512, 64, device=device, requires_grad=True))
        assert not tickets._left
        y.zero_()  # the caller's own, as autograd sees when it goes back
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (y.sum() + z.sum()).backward()
    offload.close()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_it_computes_again(chain, tmp_path, assert_same, use_reentrant):
    model, x = chain
    whole = torch.compile(model, backend=eager)
    expected = step(model, x)
    x = x.requires_grad_()
    with ActivationOffload(whole, tmp_path, min_bytes=0) as offload:
        checkpoint(whole, x, use_reentrant=use_reentrant).backward()
    assert_same([p.grad for p in model.parameters()], [2 * e for e in expected])
    offload.close()


def test_a_ticket_that_was_copied_is_refused(chain):
    model, x = chain
    whole = torch.compile(model, backend=eager)
    with saved_tensors_hooks(torch.clone, lambda kept: kept):
        loss = whole(x)
    with pytest.raises(RuntimeError, match="copied its ticket"):
        loss.backward()


def test_nothing_is_told_of_regions(chain, tmp_path, recwarn):
    model, x = chain
    whole = torch.compile(model, backend=eager)
    with ActivationOffload(whole, tmp_path, min_bytes=0) as offload:
        whole(x).backward()
    offload.close()
    assert not [w for w in recwarn if "compiled" in str(w.message)]


def test_the_compiler_is_not_loaded_before_it_is_used():
    code = "import sys, dataeff.offload; assert 'torch._inductor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
