"""Activations moved off a device: the bits of keeping them, no waiting, and memory given back.

What needs no GPU runs on the CPU too, where the disk is the only tier.
"""

import gc
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dataeff import ActivationOffload
from dataeff.storage import cufile_refusal

WIDTH, TOKENS, BATCH, LAYERS = 128, 128, 4, 4
MIB = 1 << 20
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TIERS = {
    "host": {"host_bytes": 256 * MIB},
    "disk": {"spill": True},
    "disk, checked": {"spill": True, "checksum": True},
    "disk through little staging": {"spill": True, "staging_bytes": 2 * MIB},
    "host, then disk": {"spill": True, "host_bytes": 2 * MIB},
}


class Block(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.again = again
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def attend(self, x):
        split = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (4, -1)).transpose(1, 2) for z in split)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, k, v)  # sums in one order
        return x + self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = checkpoint(self.attend, x, use_reentrant=False) if self.again else self.attend(x)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def make_model(device, again=False):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(again) for _ in range(LAYERS)]).to(device)


def make_batch(device):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator).to(device)


def offload_of(model, tmp_path, spill=False, **options):
    return ActivationOffload(model, tmp_path if spill else None, min_bytes=0, **options)


def gradients(model, run):
    model.zero_grad(set_to_none=True)
    run()
    return [p.grad.clone() for p in model.parameters()]


def skip_without(tier, device):
    if device.type == "cpu" and "host" in tier:
        pytest.skip("host memory has no host tier")


# Little staging is full while the device is late; what finds no room stays.
@pytest.mark.filterwarnings("ignore:activation offload. a tier is full:RuntimeWarning")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("budgets", [{}, {"in_flight_bytes": 0, "prefetch_bytes": 0}])
def test_gradients_are_the_bits_of_keeping(device, tmp_path, tier, again, budgets):
    skip_without(tier, device)
    model, x = make_model(device, again), make_batch(device)
    expected = gradients(model, lambda: [model(x).square().mean().backward() for _ in range(3)])
    with_offload = offload_of(model, tmp_path, **TIERS[tier], **budgets)

    def steps():
        for _ in range(3):
            with with_offload:
                model(x).square().mean().backward()

    found = gradients(model, steps)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    gc.collect()
    with_offload._cache.drain()
    report = with_offload.report()
    assert (report.bytes_host > 0) == ("host" in tier)
    assert (report.bytes_written > 0) == ("disk" in tier)
    assert report.bytes_read > 0 and report.saved_bytes == 0
    with_offload.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_retained_graphs_and_microbatches(device, tmp_path, tier):
    skip_without(tier, device)
    model, x = make_model(device), make_batch(device)
    parts = x.chunk(2)

    def run(offload=None):
        losses = []
        for i, part in enumerate(parts):
            if offload is None:
                losses.append(model(part).square().mean())
                continue
            with offload, offload.microbatch(i):
                losses.append(model(part).square().mean())
        for i, loss in enumerate(losses):
            if offload is not None:
                offload.expect_backward(i)
            loss.backward(retain_graph=True)
            loss.backward()

    expected = gradients(model, run)
    offload = offload_of(model, tmp_path, **TIERS[tier])
    found = gradients(model, lambda: run(offload))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    offload.close()


@needs_cuda
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_device_memory_is_given_up_while_forward_runs(tmp_path, tier):
    model, x = make_model("cuda"), make_batch("cuda").repeat(16, 1, 1)

    def peak(around):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with around:
            loss = model(x).square().mean()
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated() - before
            loss.backward()
        model.zero_grad(set_to_none=True)
        return held, torch.cuda.max_memory_allocated() - before

    peak(torch.enable_grad())
    kept_held, kept = peak(torch.enable_grad())
    offload = offload_of(
        model, tmp_path, **{**TIERS[tier], "host_bytes": 1 << 30 if tier == "host" else 0}
    )
    peak(offload)
    held, moved = peak(offload)
    assert held < 0.5 * kept_held and moved < 0.7 * kept
    offload.close()
    del offload
    gc.collect()
    torch.cuda.synchronize()


@needs_cuda
def test_the_host_tier_never_makes_the_host_wait(tmp_path, waits_are_errors):
    model, x = make_model("cuda"), make_batch("cuda")
    offload = offload_of(model, tmp_path, **TIERS["host"])
    for _ in range(2):
        with offload:
            model(x).square().mean().backward()
    torch.cuda.synchronize()
    with waits_are_errors(), offload:
        model(x).square().mean().backward()
    offload.close()


@needs_cuda
def test_staging_memory_is_pinned_and_given_back(tmp_path):
    model, x = make_model("cuda"), make_batch("cuda")
    offload = offload_of(model, tmp_path, **TIERS["host"])
    with offload:
        model(x).square().mean().backward()
    buffer = offload._tiers._host._pool.acquire(4096)
    memory = buffer.tensor()
    assert memory.is_pinned()
    buffer.release()
    offload.close()
    assert not memory.is_pinned()
    assert torch.ones(3, device="cuda").sum() == 3  # no error was left behind


@needs_cuda
def test_bits_survive_other_streams_and_crowded_memory(tmp_path):
    """Memory that is given up too early is overwritten at once by whoever allocates next."""
    model, x = make_model("cuda"), make_batch("cuda")
    expected = gradients(model, lambda: model(x).square().mean().backward())
    offload = offload_of(model, tmp_path, **TIERS["host"], in_flight_bytes=MIB, prefetch_bytes=MIB)

    def dirty(*_):
        for _ in range(random.randint(1, 4)):
            torch.full((random.randint(1, MIB),), float("nan"), device="cuda")

    hooks = [m.register_forward_hook(dirty) for m in model.modules()]
    # The first block's input has no gradient, of which torch would warn.
    hooks += [m.register_full_backward_hook(dirty) for m in model[1:]]
    side = torch.cuda.Stream()
    for turn in range(10):
        stream = side if turn % 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), offload:
            found = gradients(model, lambda: model(x).square().mean().backward())
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), turn
    for hook in hooks:
        hook.remove()
    offload.close()


@needs_cuda
def test_autocast_and_the_gradient_scaler(tmp_path):
    x = make_batch("cuda")

    def weights(offload_options):
        model = make_model("cuda")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda")
        around = torch.enable_grad()
        if offload_options is not None:
            around = offload_of(model, tmp_path, **offload_options)
        for _ in range(3):
            optimizer.zero_grad()
            with around:
                with torch.autocast("cuda", dtype=torch.float16):
                    loss = model(x).float().square().mean()
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if offload_options is not None:
            around.close()
        return [p.detach() for p in model.parameters()]

    for a, b in zip(weights(None), weights(TIERS["host"]), strict=True):
        assert torch.equal(a, b)


def test_auto_plans_and_keeps_the_bits(device, tmp_path):
    model, x = make_model(device), make_batch(device)
    expected = gradients(model, lambda: model(x).square().mean().backward())
    tier = TIERS["host, then disk"] if device.type == "cuda" else TIERS["disk"]
    offload = offload_of(model, tmp_path, **tier, policy="auto", memory_budget=8 * MIB)
    for _ in range(18):

        def step():
            with offload:
                model(x).square().mean().backward()

        found = gradients(model, step)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert offload.plan is not None and offload.explain()
    offload.close()


@needs_cuda
def test_cufile_gives_the_bits_of_keeping(tmp_path):
    if (refused := cufile_refusal(tmp_path)) is not None:
        pytest.skip(refused)
    model, x = make_model("cuda"), make_batch("cuda")
    expected = gradients(model, lambda: model(x).square().mean().backward())
    offload = offload_of(model, tmp_path, spill=True, engine="cufile")

    def step():
        with offload:
            model(x).square().mean().backward()

    for _ in range(3):
        found = gradients(model, step)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert offload.report().bytes_read > 0
    offload.close()


@needs_cuda
def test_many_steps_do_not_grow(tmp_path):
    gc.collect()  # what other tests left in cycles would be given back in between
    model, x = make_model("cuda"), make_batch("cuda")
    offload = offload_of(model, tmp_path, **TIERS["host, then disk"])
    held = []
    for _ in range(60):
        with offload:
            model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        offload._cache.drain()
        held.append((torch.cuda.memory_allocated(), offload.report().saved_bytes))
    assert held[-1] == held[5] and held[-1][1] == 0
    offload.close()
