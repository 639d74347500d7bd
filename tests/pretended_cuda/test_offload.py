"""Activations moved off a device whose streams run late: the bits of keeping them.

A wait that is missing, a buffer used again too early or memory given up too early shows as rubbish
in the gradients, or breaks the device.
"""

import gc
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dataeff import ActivationOffload
from dataeff.offload.streams import CudaStreams

pytestmark = pytest.mark.filterwarnings("ignore:activation offload. a tier is full:RuntimeWarning")
SEEDS = range(1, 1 + int(os.environ.get("PRETENDED_CUDA_SEEDS", "4")))
WIDTH, ROWS = 48, 96  # what a block passes on is more than the least that is moved
KIB = 1 << 10
TIERS = {
    "host": {"host_bytes": 4 << 20},
    "little host": {"host_bytes": 64 * KIB},
    "disk": {"spill": True},
    "disk, little staging": {"spill": True, "staging_bytes": 64 * KIB},
    "cufile": {"spill": True, "engine": "cufile"},
    "host, then disk": {"spill": True, "host_bytes": 64 * KIB, "checksum": True},
}
BUDGETS = {
    "budgets of their own": {},
    "no budgets": {"in_flight_bytes": 0, "prefetch_bytes": 0},
    "small budgets": {"in_flight_bytes": 40 * KIB, "prefetch_bytes": 40 * KIB},
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))).exp())


class Again(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def make_model(block=Block):
    torch.manual_seed(0)
    return nn.Sequential(*[block() for _ in range(3)]).to("cuda")


def make_batch(seed=1, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator).to("cuda")


@pytest.fixture(autouse=True)
def a_cufile(cufile):
    """For the tier of that name."""


def offload_of(model, tmp_path, spill=False, **options):
    return ActivationOffload(model, tmp_path if spill else None, min_bytes=0, **options)


class Behind(CudaStreams):
    """Copies that begin long after they were queued."""

    def _copy(self, side, source, target):
        with torch.cuda.stream(side):
            torch.cuda._sleep(1)
        return super()._copy(side, source, target)


def close(offload):
    """Closes what has moved something: where all was too small, nothing was tested."""
    assert sum(module.bytes_stored for module in offload.report().modules.values()) > 0
    offload.close()


def step(model, x, around=None):
    """Gradients of one step, on the host."""
    model.zero_grad(set_to_none=True)
    if around is None:
        model(x).square().mean().backward()
    else:
        with around:
            model(x).square().mean().backward()
    return [p.grad.cpu() for p in model.parameters()]


def assert_same(found, expected, of=None):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b), of


def dirty(*_):
    """Overwrites memory that the current stream has free."""
    for n in (ROWS * WIDTH, 2 * ROWS * WIDTH, 128):
        torch.full((n,), float("nan"), device="cuda")


def dirty_much():
    """The same, of all that was given up lately."""
    return [torch.full((2 * ROWS * WIDTH,), float("nan"), device="cuda") for _ in range(40)]


def crowd(model):
    """Allocates and overwrites memory between modules, forward and backward."""

    for block in model:
        for module in block.children():
            module.register_forward_hook(dirty)
    for block in model[1:]:
        block.register_full_backward_hook(dirty)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("block", [Block, Again])
def test_every_order_gives_the_bits_of_keeping(late, tmp_path, tier, budgets, block):
    model = make_model(block)
    crowd(model)
    batches = [make_batch(i) for i in range(2)]
    expected = [step(model, x) for x in batches]
    offload = offload_of(model, tmp_path, **TIERS[tier], **BUDGETS[budgets])
    for seed in SEEDS:
        late(seed)
        for x, bits in zip(batches, expected, strict=True):
            assert_same(step(model, x, offload), bits, seed)
    close(offload)


@pytest.mark.parametrize("tier", TIERS)
def test_steps_on_streams_of_their_own(late, tmp_path, tier):
    model, x = make_model(), make_batch()
    crowd(model)
    expected = step(model, x)
    offload = offload_of(model, tmp_path, **TIERS[tier], **BUDGETS["small budgets"])
    for seed in SEEDS:
        late(seed)
        for _ in range(2):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                assert_same(step(model, x, offload), expected, seed)
            torch.cuda.current_stream().wait_stream(stream)
    close(offload)


@pytest.mark.parametrize("tier", TIERS)
def test_backward_on_another_stream_than_forward(late, tmp_path, tier):
    model, x = make_model(), make_batch()
    expected = step(model, x)
    offload = offload_of(model, tmp_path, **TIERS[tier])
    for seed in SEEDS:
        late(seed)
        model.zero_grad(set_to_none=True)
        with offload:
            loss = model(x).square().mean()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss.backward()
            torch.cuda.current_stream().wait_stream(side)
        del loss
        assert_same([p.grad.cpu() for p in model.parameters()], expected, seed)
    close(offload)


@pytest.mark.parametrize("tier", TIERS)
def test_microbatches_and_retained_graphs(late, tmp_path, tier):
    model, parts = make_model(), make_batch(rows=2 * ROWS).chunk(2)

    def run(offload=None):
        model.zero_grad(set_to_none=True)
        losses = []
        for i, part in enumerate(parts):
            if offload is None:
                losses.append(model(part).square().mean())
                continue
            with offload, offload.microbatch(i):
                losses.append(model(part).square().mean())
        for i, loss in reversed(list(enumerate(losses))):
            if offload is not None:
                offload.expect_backward(i)
            loss.backward(retain_graph=True)
            loss.backward()
        return [p.grad.cpu() for p in model.parameters()]

    expected = run()
    offload = offload_of(model, tmp_path, **TIERS[tier])
    for seed in SEEDS:
        late(seed)
        assert_same(run(offload), expected, seed)
    close(offload)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("budgets", BUDGETS)
def test_microbatches_on_two_streams(late, tmp_path, tier, budgets):
    """A store of one stream is ended, and its memory given up, while another is current."""
    model, parts = make_model(), make_batch(rows=4 * ROWS).chunk(4)
    crowd(model)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]

    def run(offload=None):
        model.zero_grad(set_to_none=True)
        losses, now = [], torch.cuda.current_stream()
        for i, part in enumerate(parts):
            streams[i % 2].wait_stream(now)
            with torch.cuda.stream(streams[i % 2]):
                if offload is None:
                    losses.append(model(part).square().mean())
                    continue
                with offload, offload.microbatch(i):
                    losses.append(model(part).square().mean())
        for i, loss in enumerate(losses):
            with torch.cuda.stream(streams[i % 2]):
                loss.backward()
            now.wait_stream(streams[i % 2])
            streams[1 - i % 2].wait_stream(now)  # gradients are summed in this order
        return [p.grad.cpu() for p in model.parameters()]

    expected = run()
    offload = offload_of(model, tmp_path, **TIERS[tier], **BUDGETS[budgets])
    for seed in SEEDS:
        late(seed)
        assert_same(run(offload), expected, seed)
    close(offload)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_cut_off_leaves_the_next_ones_right(late, tmp_path, tier, where):
    model, x = make_model(), make_batch()
    expected = step(model, x)
    offload = offload_of(model, tmp_path, **TIERS[tier])
    fails = []

    def hook(*_):
        if fails:
            raise RuntimeError(fails.pop())

    if where == "forward":
        model[2].up.register_forward_hook(hook)
    else:
        model[1].register_full_backward_hook(hook)
    for seed in SEEDS:
        late(seed)
        fails.append("cut off")
        with pytest.raises(RuntimeError, match="cut off"):
            step(model, x, offload)
        assert_same(step(model, x, offload), expected, seed)
    close(offload)


@pytest.mark.parametrize("tier", TIERS)
def test_graphs_that_are_dropped(late, tmp_path, tier):
    model, x = make_model(), make_batch()
    expected = step(model, x)
    offload = offload_of(model, tmp_path, **TIERS[tier])
    for seed in SEEDS:
        late(seed)
        with offload:
            model(x).square().mean()  # no backward: what was saved goes at once
        assert_same(step(model, x, offload), expected, seed)
    gc.collect()
    offload._cache.drain()
    assert offload.report().saved_bytes == 0
    close(offload)


def test_closed_with_copies_under_way(late, tmp_path):
    """Pinned memory is given back after the last copy."""
    model, x = make_model(), make_batch()
    for seed in SEEDS:
        late(seed)
        for tier in ("host", "disk"):
            offload = offload_of(model, tmp_path, **TIERS[tier])
            with offload:
                loss = model(x).square().mean()
            del loss
            offload.close()
        torch.cuda.synchronize()
        assert (torch.ones(3, device="cuda") + 1).sum().item() == 6


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_memory_stays_until_the_copy_from_it_has_ended(late, held, tmp_path, tier):
    """Also when nobody wants the copy any more: the allocator may unmap what it gets back."""
    late(0)
    model, x = make_model(), make_batch()
    offload = offload_of(model, tmp_path, **TIERS[tier])
    step(model, x, offload)
    before = torch.cuda.memory_allocated()
    with held():
        with offload:
            loss = model(x).square().mean()
            saved = torch.cuda.memory_allocated()
            del loss
        offload._cache._poll()
        assert before < torch.cuda.memory_allocated() < saved
    offload._cache.drain()
    offload._cache._poll()
    assert torch.cuda.memory_allocated() == before
    close(offload)


@pytest.mark.parametrize("tier", ["host", "disk", "cufile"])
@pytest.mark.parametrize("way", ["out", "in"])
def test_closed_while_backward_is_owed(late, tmp_path, tier, way):
    """What the graph still holds is copied to and from memory that close gives back."""
    late(0)
    model, x = make_model(), make_batch()
    offload = offload_of(model, tmp_path, **TIERS[tier], streams_of=Behind)
    with offload:
        loss = model(x).square().mean()
    if way == "in":
        offload._cache.drain()
        torch.cuda.synchronize()
        offload.expect_backward()
    close(offload)
    del loss
    torch.cuda.synchronize()
    assert (torch.ones(3, device="cuda") + 1).sum().item() == 6


@pytest.mark.parametrize("tier", ["host", "disk", "cufile"])
def test_a_store_that_ends_while_another_stream_is_current(late, tmp_path, tier):
    """The memory goes back to the stream that saved, which has to wait for the copy."""
    late(0)
    model, x = make_model(), make_batch()
    expected = step(model, x)
    offload = offload_of(model, tmp_path, **TIERS[tier], in_flight_bytes=0, streams_of=Behind)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    with torch.cuda.stream(one), offload:
        loss = model(x).square().mean()
    with torch.cuda.stream(other), offload, offload.microbatch(1):
        model(x).square().mean()  # makes room for its own
    with torch.cuda.stream(one):
        dirty_much()
        loss.backward()
    torch.cuda.synchronize()
    assert_same([p.grad.cpu() for p in model.parameters()], expected)
    close(offload)


class OnTheSide(torch.autograd.Function):
    """The square, with a backward that works on another stream."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        now, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(now)
        torch.cuda._sleep(1)  # what the saving stream is given to do for the load is late
        with torch.cuda.stream(side):
            (x,) = ctx.saved_tensors
            made = 2 * x * gradient
        now.wait_stream(side)
        made.record_stream(now)
        return made


@pytest.mark.parametrize("tier", ["host", "disk", "cufile"])
def test_backward_that_asks_on_a_stream_of_its_own(late, tmp_path, tier):
    late(0)
    model, x = make_model(), make_batch(rows=2 * ROWS - 3)  # no whole pages

    def run():
        model.zero_grad(set_to_none=True)
        OnTheSide.apply(model(x)).tanh().mean().backward()  # tanh ends its store
        return [p.grad.cpu() for p in model.parameters()]

    expected = run()
    offload = offload_of(model, tmp_path, **TIERS[tier], **BUDGETS["no budgets"], streams_of=Behind)
    with offload:
        found = run()
    assert_same(found, expected)
    close(offload)


@pytest.mark.parametrize("tier", ["host", "disk", "cufile"])
def test_blocks_on_two_streams(late, tmp_path, tier):
    """What one stream's backward fetches ahead is the other's memory, in the other's order."""
    late(0)
    model, x = make_model(), make_batch()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for block in model[1:]:
        block.register_full_backward_hook(lambda *_: torch.cuda._sleep(1))
        block.up.register_full_backward_hook(lambda *_: torch.cuda._sleep(1))

    def run():
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        y = x
        for i, block in enumerate(model):
            here, there = streams[i % 2], streams[1 - i % 2]
            here.wait_stream(there)
            with torch.cuda.stream(here):
                y.record_stream(here)
                y = block(y)
        with torch.cuda.stream(here):
            loss = y.square().mean()
        torch.cuda.synchronize()
        with torch.cuda.stream(there):
            torch.cuda._sleep(1)
            dirty_much()
        with torch.cuda.stream(here):
            loss.backward()
        torch.cuda.synchronize()
        return [p.grad.cpu() for p in model.parameters()]

    expected = run()
    offload = offload_of(model, tmp_path, **TIERS[tier])
    for _ in range(3):
        with offload:
            found = run()
        assert_same(found, expected)
    close(offload)


@pytest.mark.parametrize("tier", ["host", "disk", "cufile"])
def test_memory_of_another_stream(late, tmp_path, tier):
    """Saved on one stream, allocated on another: a graph alone would keep it from being reused."""
    late(0)
    model, x = make_model(), make_batch(rows=2 * ROWS)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()

    def run():
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        with torch.cuda.stream(other), torch.no_grad():
            y = x.exp()
        one.wait_stream(other)
        with torch.cuda.stream(one):
            torch.cuda._sleep(1)
            loss = model(y * 2).square().mean() + model[0].up(y).square().mean()
        del y
        with torch.cuda.stream(one):
            loss = loss + model(x.exp()).square().mean()
        with torch.cuda.stream(other):
            dirty_much()
        with torch.cuda.stream(one):
            loss.backward(retain_graph=True)  # or `y` went back while `one` still reads it
        torch.cuda.synchronize()
        return [p.grad.cpu() for p in model.parameters()]

    expected = run()
    offload = offload_of(model, tmp_path, **TIERS[tier], in_flight_bytes=0, streams_of=Behind)
    with offload:
        found = run()
    assert_same(found, expected)
    close(offload)


def test_the_plan_of_measured_steps(late, tmp_path):
    model, x = make_model(), make_batch()
    expected = step(model, x)
    for seed in (SEEDS[0], SEEDS[-1]):
        late(seed)
        tier = TIERS["host, then disk"]
        offload = offload_of(model, tmp_path, **tier, policy="auto", memory_budget=100 * KIB)
        for _ in range(18):
            assert_same(step(model, x, offload), expected, seed)
        assert offload.plan is not None
        offload.close()
