"""What hooks see of a checkpoint's inputs, form by form, and a checkpoint that shows them all."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import set_checkpoint_early_stop

from dataeff.offload import ActivationOffload, checkpoint
from dataeff.offload.planner import Action


@pytest.fixture
def block():
    torch.manual_seed(0)
    layer = nn.Linear(256, 256)
    return layer, lambda x: layer(torch.tanh(x)).sin()


def as_keyword(block, x, reentrant):
    def call(*, x):
        return block(x)

    return torch_checkpoint(call, x=x, use_reentrant=reentrant)


def as_tuple(block, x, reentrant):
    return torch_checkpoint(lambda pair: block(pair[0]), (x, 1), use_reentrant=reentrant)


def as_partial(block, x, reentrant):
    return torch_checkpoint(functools.partial(block, x), use_reentrant=reentrant)


def as_positional(block, x, reentrant):
    return torch_checkpoint(block, x, use_reentrant=reentrant)


class Again(torch.autograd.Function):
    """As libraries other than torch write a reentrant checkpoint."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


def as_function(block, x, reentrant):
    return Again.apply(block, x)


def within_another(block, x, reentrant):
    def outer(x):
        return torch_checkpoint(block, x, use_reentrant=reentrant)

    return torch_checkpoint(outer, x, use_reentrant=reentrant)


def ours_as_keyword(block, x, reentrant):
    return checkpoint(lambda *, x: block(x), x=x)


def ours_as_tuple(block, x, reentrant):
    return checkpoint(lambda pair, scale: block(pair["x"][0]) * scale, {"x": (x, 1)}, 1.0)


def freed_and_gradients(form, layer, block, offload, reentrant):
    """Whether the input of the checkpoint left memory, and the gradients."""
    source = torch.linspace(-1, 1, 256 * 256).view(256, 256).requires_grad_()
    x = source * 2
    gone = weakref.ref(x.untyped_storage())
    with offload:
        y = form(block, x, reentrant)
        del x
        offload._cache.drain()
        gc.collect()
        freed = gone() is None
        y.sum().backward()
    gradients = [source.grad, layer.weight.grad.clone()]
    layer.zero_grad()
    return freed, gradients


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(
    ("form", "reentrant", "seen"),
    [
        (as_positional, False, True),
        (as_positional, True, True),
        (within_another, False, True),
        (within_another, True, True),
        (as_function, True, True),
        (as_keyword, False, False),
        (as_tuple, False, False),
        (as_partial, False, False),
        (ours_as_keyword, False, True),
        (ours_as_tuple, False, True),
    ],
)
def test_which_checkpoint_inputs_leave_memory(block, tmp_path, form, reentrant, seen, early_stop):
    layer, run = block
    keep = ActivationOffload(layer, tmp_path, policy=lambda info: False)
    offload = ActivationOffload(layer, tmp_path, min_bytes=0)
    with set_checkpoint_early_stop(early_stop):
        _, expected = freed_and_gradients(form, layer, run, keep, reentrant)
        freed, got = freed_and_gradients(form, layer, run, offload, reentrant)
    assert freed == seen
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    gc.collect()
    report = offload.report()
    assert report.saved_bytes == 0
    # What backward saves when it runs again, it wants at once.
    moved = report.bytes_packed - report.bytes_deduplicated - report.bytes_kept
    assert moved == seen * 256 * 256 * 4


def test_checkpoint_runs_again_and_not_earlier(block, tmp_path):
    layer, _ = block
    calls = []

    def counted(x, *, note):
        calls.append(note)
        return layer(x)

    y = checkpoint(counted, torch.ones(4, 256, requires_grad=True), note="called")
    assert calls == ["called"]
    y.sum().backward()
    assert calls == ["called", "called"]


FORMS = {
    "module": lambda block: block,
    "method": lambda block: block.__call__,
    "partial": lambda block: functools.partial(functools.partial(block)),
    "cell": lambda block: lambda *args: block(*args),
    "default": lambda block: lambda *args, block=block: block(*args),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_inputs_of_a_checkpoint_are_those_of_the_block_that_it_runs(
    gpt_and_loss, gradients, assert_same, tmp_path, form, reentrant
):
    """Who names a block that the model checkpoints, or has it planned for, means these."""
    model, loss = gpt_and_loss

    def run(tokens):
        x = model.tok(tokens) + model.pos
        for block in model.blocks:
            x = torch_checkpoint(FORMS[form](block), x, use_reentrant=reentrant)
        return model.head(x).logsumexp(-1).sum()

    model.forward = run
    expected = gradients(model, lambda: loss().backward())
    options = {"min_bytes": 0}
    named = ActivationOffload(model, tmp_path, policy=["blocks.1"], **options)

    def step(offload):
        with offload:
            value = loss()
            offload._cache.drain()
            value.backward()

    assert_same(gradients(model, lambda: step(named)), expected)
    modules = named.report().modules
    moved = {name for name, account in modules.items() if account.bytes_stored}
    assert moved == {"blocks.1"} and named.report().bytes_written >= 4 * 64 * 64 * 4
    named.close()
    planned = ActivationOffload(model, tmp_path, policy="auto", memory_budget=1, **options)
    for _ in range(18):
        assert_same(gradients(model, lambda: step(planned)), expected)
    assert all(p.saved_bytes >= 4 * 64 * 64 * 4 for p in planned.plan.profiles)
    assert set(planned.plan.actions) <= {Action.DISK, Action.KEEP}  # they run again as it is
    assert Action.DISK in planned.plan.actions
    planned.close()
