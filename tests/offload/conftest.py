"""A small GPT, and the comparison that every test of the offload comes down to."""

import contextlib
import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dataeff.offload.moments import HostMoment


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, w = x.shape
        split = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in split)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    def __init__(self, vocab=64, width=64, layers=3, heads=4, seq=64):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocab, width), nn.Parameter(torch.zeros(seq, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens.roll(-1, 1).flatten())


def make_mlp():
    layers = [m for _ in range(4) for m in (nn.Linear(128, 128), nn.GELU())]
    model = nn.Sequential(*layers)
    return model, lambda: model(torch.ones(128, 128).cumsum(0) / 128).square().mean()


def make_conv():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, stride=2), nn.GroupNorm(4, 32), nn.SiLU(inplace=True), nn.Flatten(),
        nn.LazyLinear(10),
    )  # fmt: skip
    x = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
    model(x)
    return model, lambda: model(x).logsumexp(1).sum()


def make_gpt():
    model = TinyGPT()
    tokens = torch.arange(4 * 64).view(4, 64) * 7 % 64
    return model, lambda: model(tokens)


MODELS = {"mlp": make_mlp, "conv": make_conv, "gpt": make_gpt}


@pytest.fixture(params=sorted(MODELS))
def model_and_loss(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture
def gpt_and_loss():
    torch.manual_seed(0)
    return make_gpt()


@pytest.fixture
def gradients():
    """gradients(model, run): what `run()` leaves in the parameters, from clean ones."""

    def collect(model, run):
        model.zero_grad(set_to_none=True)
        run()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    return collect


@pytest.fixture
def assert_same():
    def check(got, expected):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)

    return check


class LateStreams:
    """Side streams of a device that is really host memory: copies happen late, in queue order.

    Whoever frees or fills a buffer without ordering itself behind the copy gives backward wrong
    bytes here, as on a GPU.
    """

    def __init__(self, device, delay_s=0.003):
        self.delay_s = delay_s
        self.queues = {way: ThreadPoolExecutor(1) for way in ("out", "in")}
        self.num_out = self.num_in = 0
        self.pinned = 0
        self.open = threading.Event()  # while it is not set, no copy ends
        self.open.set()

    def _copy(self, way, source, target):
        ends = [target, source]  # as on a GPU, what is copied is held by nothing once it has been

        def run():
            begin_ns = time.perf_counter_ns()
            time.sleep(self.delay_s)
            self.open.wait()
            source, target = ends.pop(), ends.pop()
            ctypes.memmove(target.data_ptr(), source.data_ptr(), target.numel())
            return begin_ns, time.perf_counter_ns()

        assert source.numel() == target.numel()
        return Reached(self.queues[way].submit(run))

    def copy_out(self, source, target):
        self.num_out += 1
        return self._copy("out", source, target)

    def copy_in(self, source, target):
        self.num_in += 1
        return self._copy("in", source, target)

    def mark(self):
        """What was queued to be copied in has then been, however late."""
        return Reached(self.queues["in"].submit(time.sleep, self.delay_s))

    def share(self, memory):
        pass

    def order_after(self, event):
        event.synchronize()

    reuse_after = order_after

    def beside(self, event):
        return contextlib.nullcontext()

    def moment(self):
        return HostMoment()

    def pin(self, buffer):
        self.pinned += 1

    def unpin(self, buffer):
        self.pinned -= 1


class Reached:
    def __init__(self, future):
        self.future = future

    def query(self):
        return self.future.done()

    def synchronize(self):
        self.future.result()

    def span(self):
        return self.future.result() if self.future.done() else None


@pytest.fixture
def until_running():
    """until_running(future): returns once a thread has taken it up."""

    def wait(future):
        deadline = time.monotonic() + 10
        while not future.running() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert future.running()

    return wait


@pytest.fixture
def late_streams():
    streams = LateStreams(None)
    yield streams
    for queue in streams.queues.values():
        queue.shutdown()
