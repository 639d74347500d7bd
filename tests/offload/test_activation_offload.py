"""The same bits with and without, and memory that really falls."""

import gc
import json
import threading
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dataeff.offload import ActivationOffload


@pytest.fixture
def offload_of(tmp_path):
    made = []

    def make(model, **kwargs):
        made.append(ActivationOffload(model, tmp_path, **{"min_bytes": 0, **kwargs}))
        return made[-1]

    yield make
    for offload in made:
        offload.close()


def assert_adds_up(offload):
    offload._cache.drain()  # a write that backward overtook counts when it ends
    report = offload.report()
    assert report.bytes_packed == (
        report.bytes_deduplicated
        + report.bytes_kept
        + report.bytes_written
        + report.bytes_host
        + report.bytes_cancelled
        + report.bytes_failed
    )
    assert report.saved_bytes == 0


def test_gradients_are_bit_identical_over_steps(model_and_loss, offload_of, gradients, assert_same):
    model, loss = model_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = offload_of(model)
    for _ in range(4):

        def step():
            with offload:
                loss().backward()

        assert_same(gradients(model, step), expected)
    assert_adds_up(offload)
    report = offload.report()
    assert report.bytes_written > 0 and report.reason == ""


def test_backward_may_run_after_the_block(gpt_and_loss, offload_of, gradients, assert_same):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = offload_of(model)

    def step():
        with offload:
            value = loss()
        value.backward()

    assert_same(gradients(model, step), expected)


def test_storages_are_freed_while_forward_runs(offload_of):
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    x = torch.randn(1024, 512)  # each activation is 2 MiB
    alive = []

    def watch(module, args, output):
        alive.append(weakref.ref(output.untyped_storage()))

    for layer in model:
        layer.register_forward_hook(watch)
    offload = offload_of(model, in_flight_bytes=0)
    with offload:
        out = model(x)
        offload._cache.drain()
        gc.collect()
        # The last output is ours; all others are on disk only.
        assert [ref() is not None for ref in alive] == [False] * 7 + [True]
        assert offload.report().saved_bytes < 8 * 2 * 4096  # the unaligned ends
        out.sum().backward()
    assert offload.report().bytes_read == 7 * (2 << 20)


def test_peak_is_bounded_by_the_budgets(offload_of):
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)])
    x = torch.randn(512, 512)  # each activation is 1 MiB
    keep = offload_of(model, policy=lambda info: False)
    offload = offload_of(model, in_flight_bytes=2 << 20, prefetch_bytes=2 << 20)
    for active in (keep, offload):
        with active:
            model(x).sum().backward()
    assert keep.report().peak_saved_bytes == 15 << 20  # the input is the caller's
    assert keep.report().bytes_written == 0
    ends = 15 * 2 * 4096
    # One store being admitted over the budget, and one load that backward demands over it.
    assert offload.report().peak_saved_bytes <= (3 << 20) + (1 << 20) + ends


def test_views_of_one_storage_are_written_once(offload_of):
    model = nn.Linear(64, 192)

    def loss():
        q, k, v = model(torch.ones(128, 64)).exp().chunk(3, dim=-1)
        return (q * k * v).sum()

    loss().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    offload = offload_of(model)
    with offload:
        value = loss()
        offload._cache.drain()
    value.backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, g)
    report = offload.report()
    # q*k and the product with v save q, k, v; exp saves its whole output: one storage.
    assert report.bytes_deduplicated >= 3 * 128 * 192 * 4
    assert report.bytes_written <= 128 * 192 * 4 + 128 * 64 * 4


def test_parameters_their_views_and_inputs_stay(offload_of):
    model = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256))
    x = torch.randn(256, 256, requires_grad=True)
    asked = []
    offload = offload_of(model, policy=lambda info: bool(asked.append(info)) or True)
    with offload:
        model(x).sum().backward()
    assert [info.storage_nbytes for info in asked] == [256 * 256 * 4]  # what BatchNorm saves
    assert offload.report().bytes_excluded >= 2 * 256 * 256 * 4


def test_a_batch_that_is_a_slice_of_the_data_leaves_the_data_alone(offload_of):
    """Labels do not pass through the model, so nobody says whose they are."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), torch.randn(256, 64)
    labels = torch.randn(100_000, 64)
    params = list(model.parameters())
    expected = torch.autograd.grad(F.mse_loss(model(x), labels[512:768]), params)
    offload = offload_of(model)
    with offload:
        loss = F.mse_loss(model(x), labels[512:768])
        offload._cache.drain()
        got = torch.autograd.grad(loss, params)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    report = offload.report()
    assert 0 < report.bytes_written < labels.nbytes <= report.bytes_excluded
    batch = labels[512:768]
    with offload:
        loss = F.mse_loss(model(x), batch)
        batch.add_(1)
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


class ScaledByFew(torch.autograd.Function):
    """Saves a small slice, taken inside, of an activation."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x[:4])
        return x * x[:4].sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].sum()


def test_a_small_slice_of_an_activation_is_moved_with_it(offload_of):
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64), torch.randn(256, 64)
    expected = torch.autograd.grad(ScaledByFew.apply(model(x)).sum(), model.weight)[0]
    offload = offload_of(model)
    with offload:
        loss = ScaledByFew.apply(model(x)).sum()
        offload._cache.drain()
        got = torch.autograd.grad(loss, model.weight)[0]
    assert torch.equal(got, expected)
    assert offload.report().bytes_written == 256 * 64 * 4


def test_autocast_casts_of_weights_stay(offload_of, gradients, assert_same):
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
    x = torch.randn(64, 256)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().sum()

    expected = gradients(model, lambda: loss().backward())
    shapes = []
    offload = offload_of(model, policy=lambda info: bool(shapes.append(info.shape)) or True)

    def step():
        with offload:
            loss().backward()

    assert_same(gradients(model, step), expected)
    assert shapes and (256, 256) not in shapes


class Casts(nn.Module):
    """Products with parameters, a frozen one and a buffer: cast, transposed, laid out anew."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 160))
        self.frozen = nn.Parameter(torch.randn(160, 96), requires_grad=False)
        self.register_buffer("table", torch.randn(112, 96))
        self.last = nn.Parameter(torch.randn(144, 112))

    def forward(self, x):
        y = x @ self.weight.to(torch.bfloat16)
        y = y @ self.frozen.to(torch.bfloat16)
        y = y @ self.table.t().to(torch.bfloat16).contiguous()
        return y @ self.last.t().to(torch.bfloat16).contiguous()


def test_casts_of_parameters_and_buffers_stay(offload_of):
    torch.manual_seed(0)
    model, x = Casts(), torch.randn(192, 128, dtype=torch.bfloat16)
    weights = [model.weight, model.last]
    expected = torch.autograd.grad(model(x).float().sum(), weights)
    shapes = []
    offload = offload_of(model, policy=lambda info: bool(shapes.append(tuple(info.shape))) or True)
    with offload:
        got = torch.autograd.grad(model(x).float().sum(), weights)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert shapes == [(192, 112)]  # of the products, the one that a gradient needs


def test_what_only_looks_like_a_frozen_parameter_is_moved(offload_of):
    model = nn.Linear(128, 128).requires_grad_(False)
    x = torch.randn(128, 128, requires_grad=True)
    offload = offload_of(model)
    with offload:
        y = model(x) * torch.rand(128, 128)  # saves what it is multiplied by, of the same dtype
    assert offload.report().bytes_packed - offload.report().bytes_kept == 128 * 128 * 4
    del y


def test_a_model_whose_parameters_have_no_size_yet(offload_of):
    def make():
        model = nn.Sequential(nn.LazyLinear(128), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1))
        return model, torch.ones(256, 64).cumsum(0) / 256

    def train(model, x, context):
        torch.manual_seed(0)
        for _ in range(2):
            with context:
                model(x).sum().backward()
        return [p.grad for p in model.parameters()]

    plain, x = make()
    lazy, _ = make()
    offload = offload_of(lazy)
    expected, got = train(plain, x, torch.enable_grad()), train(lazy, x, offload)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert offload.report().bytes_written + offload.report().bytes_cancelled > 0


@pytest.mark.parametrize("wait_for_disk", [False, True])
def test_retain_graph_gives_the_same_bits_each_time(
    gpt_and_loss, offload_of, gradients, assert_same, wait_for_disk
):
    model, loss = gpt_and_loss

    def twice(offload):
        with offload:
            value = loss()
            if wait_for_disk:
                offload._cache.drain()
            value.backward(retain_graph=True)
            value.backward(retain_graph=True)
            value.backward()

    def plainly():
        value = loss()
        value.backward(retain_graph=True)
        value.backward(retain_graph=True)
        value.backward()

    expected = gradients(model, plainly)
    offload = offload_of(model)
    assert_same(gradients(model, lambda: twice(offload)), expected)
    assert_adds_up(offload)
    report = offload.report()
    if wait_for_disk:
        assert report.bytes_read > 2 * report.bytes_written


def test_double_backward(offload_of):
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
    x = torch.randn(128, 128, requires_grad=True)

    def penalty():
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return g.square().sum()

    expected = torch.autograd.grad(penalty(), list(model.parameters()))
    offload = offload_of(model)
    with offload:
        value = penalty()
        offload._cache.drain()
        got = torch.autograd.grad(value, list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert offload.report().bytes_deduplicated > 0  # what backward saves again is not new
    del value, got
    assert_adds_up(offload)


def test_gradient_of_a_part_then_of_all(gpt_and_loss, offload_of):
    model, loss = gpt_and_loss
    late = list(model.blocks[-1].parameters())
    everything = list(model.parameters())
    value = loss()
    expected = torch.autograd.grad(value, late, retain_graph=True)
    expected += torch.autograd.grad(value, everything)
    offload = offload_of(model)
    with offload:
        value = loss()
        offload._cache.drain()
        got = torch.autograd.grad(value, late, retain_graph=True)
        got += torch.autograd.grad(value, everything)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("around", ["inside", "outside"])
def test_checkpoint_in_both_forms(
    gpt_and_loss, offload_of, gradients, assert_same, use_reentrant, around
):
    model, _ = gpt_and_loss
    tokens = torch.arange(4 * 64).view(4, 64) % 64
    offload = offload_of(model)

    def block_with_offload(block, x):
        with offload:
            return block(x)

    def forward(offloaded):
        x = model.tok(tokens) + model.pos
        for block in model.blocks:
            if offloaded and around == "inside":  # the offload inside the checkpointed function
                x = checkpoint(block_with_offload, block, x, use_reentrant=use_reentrant)
            else:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
        return model.head(x).square().mean()

    def outside():
        with offload:
            forward(True).backward()

    expected = gradients(model, lambda: forward(False).backward())
    inside = lambda: forward(True).backward()  # noqa: E731
    for _ in range(2):
        assert_same(gradients(model, outside if around == "outside" else inside), expected)
    assert offload.report().num_packed > 0
    assert_adds_up(offload)


def test_change_in_place_after_saving_raises_as_torch_does(offload_of):
    model = nn.Linear(128, 128)
    for when in ("before the write ends", "after"):
        offload = offload_of(model)
        with offload:
            y = model(torch.randn(128, 128)).exp()
            out = y.sum()
            if when == "after":
                offload._cache.drain()
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


def test_change_in_place_of_a_weight_raises(offload_of):
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    with offload_of(model):
        out = model(torch.randn(4, 128)).sum()
    with torch.no_grad():
        model[1].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"size \[128, 128\].*expected version"):
        out.backward()


def test_change_in_place_before_saving_again_saves_anew(offload_of):
    w = torch.ones(128, 128, requires_grad=True)

    def loss():
        y = w * 1.5
        a = y.detach() * w  # saves y
        y.detach().mul_(2)
        return (y.detach() * w).sum(), a  # saves y again, twice as large

    expected = torch.autograd.grad(loss()[0], w)[0]
    offload = offload_of(nn.Identity())
    with offload:
        second, first = loss()
        offload._cache.drain()
    assert torch.equal(torch.autograd.grad(second, w)[0], expected)
    with pytest.raises(RuntimeError, match="inplace"):
        first.sum().backward()


class ScribblesOnItsTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        before = saved.clone()
        saved.zero_()
        return before * grad


def test_a_backward_that_scribbles_does_not_spoil_the_second(offload_of):
    x = torch.randn(128, 128, requires_grad=True)
    offload = offload_of(nn.Identity())
    with offload:
        out = ScribblesOnItsTensor.apply(x)
        offload._cache.drain()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        out.backward()


def test_tensors_that_backward_never_wants_are_released(offload_of):
    model = nn.Linear(256, 256)
    offload = offload_of(model)
    for _ in range(3):
        with offload:
            out = model(torch.randn(256, 256)).exp()
        del out
    assert_adds_up(offload)
    assert offload.report().num_unpacked == 0


def test_threads_may_run_backward_side_by_side(offload_of):
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(128, 128), nn.Tanh())])
    inputs = [torch.randn(128, 128) for _ in range(4)]
    expected = [torch.autograd.grad(model(x).sum(), list(model.parameters())) for x in inputs]
    offload = offload_of(model)
    with offload:
        losses = [model(x).sum() for x in inputs]
    offload._cache.drain()
    got = [None] * len(inputs)

    def run(i):
        got[i] = torch.autograd.grad(losses[i], list(model.parameters()))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_exception_leaves_it_usable(gpt_and_loss, offload_of, gradients, assert_same):
    model, loss = gpt_and_loss
    expected = gradients(model, lambda: loss().backward())
    offload = offload_of(model)
    with pytest.raises(ZeroDivisionError), offload:
        loss()
        1 / 0  # noqa: B018

    def explode(grad):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), offload:
        hook = model.blocks[1].up.weight.register_hook(explode)
        try:
            loss().backward()
        finally:
            hook.remove()

    def step():
        with offload:
            loss().backward()

    assert_same(gradients(model, step), expected)
    gc.collect()
    assert_adds_up(offload)


def test_kinds_that_are_not_moved_are_kept_intact(offload_of):
    offload = offload_of(nn.Identity())
    dense = torch.randn(64, 64, requires_grad=True)
    sparse = torch.eye(64).to_sparse()
    empty = torch.empty(0, 4, requires_grad=True)
    z = torch.randn(64, 64, dtype=torch.complex64, requires_grad=True)
    half = nn.Parameter(torch.randn(64, 64))

    def losses():
        yield torch.sparse.mm(sparse, dense).square().sum(), dense
        yield (empty * empty).sum(), empty
        yield (z.conj() * z).abs().sum(), z
        yield (half.expand(3, 64, 64) * half).sum(), half

    expected = [torch.autograd.grad(out, x)[0] for out, x in losses()]
    with offload:
        got = [torch.autograd.grad(out, x)[0] for out, x in losses()]
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_says_why_nothing_was_offloaded(offload_of):
    model = nn.Linear(16, 16)
    offload = offload_of(model)
    assert "inside `with offload:`" in offload.report().reason
    with offload:
        model(torch.randn(4, 16)).exp().sum().backward()
    assert "min_bytes=16384" in offload.report().reason
    assert "min_bytes" in str(offload.report())


def test_trace_holds_stores_loads_and_bytes(offload_of, tmp_path):
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    offload = offload_of(model)
    with offload:
        out = model(torch.randn(256, 256))
        offload._cache.drain()
        out.sum().backward()
    offload.trace(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    events = written["traceEvents"]
    assert written["otherData"] == {"num_dropped_spans": 0}
    stores = [e for e in events if e.get("cat") == "store"]
    assert sum(e["args"]["nbytes"] for e in stores) == offload.report().bytes_written
    assert any(e.get("cat") == "load" for e in events)


def test_the_peak_on_disk_is_what_was_there_at_once(offload_of):
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    offload = offload_of(model)
    for _ in range(3):
        with offload:
            out = model(torch.randn(256, 256))
            offload._cache.drain()
            out.sum().backward()
        del out
    report = offload.report()
    # Three storages, but for the parts of a page at their ends.
    assert 3 * (2**18 - 4096) <= report.peak_disk_bytes <= 3 * 2**18
    assert report.peak_host_bytes == 0
    assert "peak_disk_bytes" in str(report)


def test_misuse_is_refused_clearly(tmp_path):
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'most' is neither 'all', 'auto'"):
        ActivationOffload(model, tmp_path, policy="most")
    with pytest.raises(TypeError, match="policy: 3"):
        ActivationOffload(model, tmp_path, policy=3)
    with pytest.raises(TypeError, match=r"model: .* not function"):
        ActivationOffload(lambda x: x, tmp_path)
    with pytest.raises(ValueError, match="nowhere to offload to"):
        ActivationOffload(model, [])
    with pytest.raises(OSError, match="nowhere"):
        ActivationOffload(model, tmp_path / "nowhere")
    offload = ActivationOffload(model, tmp_path)
    offload.close()
    offload.close()
    with pytest.raises(RuntimeError, match="closed"), offload:
        pass


def test_a_step_inside_a_captured_graph_is_refused(tmp_path, monkeypatch):
    offload = ActivationOffload(nn.Linear(4, 4), tmp_path)
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_initialized", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="CUDA graph"), offload:
            pass
    with offload:
        pass
    offload.close()


def test_what_moves_inside_a_captured_graph_is_refused(tmp_path, monkeypatch):
    """The block began before the capture; forward or backward comes in it."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    offload = ActivationOffload(model, tmp_path, min_bytes=0)
    x, capturing = torch.randn(256, 64), [False]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    with offload:
        capturing[0] = True
        with pytest.raises(RuntimeError, match="CUDA graph"):
            model(x)
        capturing[0] = False
        loss = model(x).sum()
        capturing[0] = True
        with pytest.raises(RuntimeError, match="CUDA graph"):
            loss.backward()
        capturing[0] = False
        model.zero_grad()
        model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    offload.close()
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_an_offload_collected_during_a_capture_is_closed_after_it(tmp_path, monkeypatch):
    offload = ActivationOffload(nn.Linear(4, 4), tmp_path)
    tiers, capturing = offload._tiers, [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(tiers, "close", mock.Mock(side_effect=tiers.close))
    del offload
    gc.collect()
    assert not tiers.close.called
    capturing[0] = False
    ActivationOffload(nn.Linear(4, 4), tmp_path).close()
    assert tiers.close.called
