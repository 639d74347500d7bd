"""Tensors that are not plain float32 matrices: moved where that is safe, kept where it is not."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dataeff.offload import ActivationOffload


class Keeps(torch.autograd.Function):
    """Saves what `make` makes of x, and hands it to `check` in backward."""

    @staticmethod
    def forward(ctx, x, make, check):
        ctx.save_for_backward(make(x.detach()))
        ctx.check = check
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.check(ctx.saved_tensors[0])
        return grad * 2, None, None


@pytest.fixture
def offload(tmp_path):
    with warnings.catch_warnings():
        offload = ActivationOffload(nn.Identity(), tmp_path, min_bytes=0)
    yield offload
    offload.close()


def save_and_restore(offload, make):
    """What `make(x)` is when it has been on disk, or was kept."""
    seen = []
    x = torch.randn(64, 256, requires_grad=True)
    with offload:
        out = Keeps.apply(x, make, seen.append)
        offload._cache.drain()
    out.sum().backward()
    (got,) = seen
    return make(x.detach()), got


MOVED = {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: torch.complex(x, x + 1),
    "bool": lambda x: x > 0,
    "int8": lambda x: (x * 10).to(torch.int8),
    "channels last": lambda x: (x.view(4, 16, 16, 16) + 0).contiguous(
        memory_format=torch.channels_last
    ),
    "negative strides' like": lambda x: (x + 0).t()[1::3],
    "expanded": lambda x: (x + 0)[:, :1].expand(64, 100),
    "overlapping": lambda x: (x + 0).view(-1).unfold(0, 100, 50),
    "imaginary part": lambda x: torch.complex(x, x + 1).imag,
    "bytes of floats": lambda x: (x + 0).view(torch.uint8),
}


@pytest.mark.parametrize("name", MOVED)
def test_strided_kinds_are_moved(offload, name):
    expected, got = save_and_restore(offload, MOVED[name])
    assert (got.dtype, got.shape, got.stride()) == (
        expected.dtype, expected.shape, expected.stride(),
    )  # fmt: skip
    as_bytes = lambda t: t.contiguous().view(torch.uint8)  # noqa: E731
    assert torch.equal(as_bytes(got), as_bytes(expected))
    if name == "channels last":
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert offload.report().bytes_written > 0 and offload.report().saved_bytes == 0


def quantised(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it will drop the kind
        return torch.quantize_per_tensor(x, 0.1, 3, torch.qint8)


KEPT = {
    "quantised": (quantised, lambda t: t.int_repr()),
    "conjugate": (lambda x: torch.complex(x, x + 1).conj(), lambda t: t.resolve_conj()),
    "negated": (lambda x: torch.complex(x, x + 1).conj().imag, lambda t: t.resolve_neg()),
    "zeros without bytes": (lambda x: torch._efficientzerotensor(64, 256), lambda t: t + 0),
    "zero-size": (lambda x: x[:0] + 0, lambda t: t),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_kinds_are_kept_as_they_are(offload, name):
    make, value = KEPT[name]
    expected, got = save_and_restore(offload, make)
    assert torch.equal(value(got), value(expected))
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert offload.report().bytes_written == 0 and offload.report().saved_bytes == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about its own decompositions
def test_forward_mode_under_an_offload(offload):
    """Its tangents of parameters are zeros that have no bytes, and are saved like others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    x = torch.randn(256, 64)
    expected = torch.func.jvp(model, (x,), (x,))[1]
    expected_grads = torch.autograd.grad(expected.sum(), list(model.parameters()))
    with offload:
        got = torch.func.jvp(model, (x,), (x,))[1]
        offload._cache.drain()
        grads = torch.autograd.grad(got.sum(), list(model.parameters()))
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_is_kept(offload, layout):
    sparse = getattr(torch.eye(64), layout)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR is called beta
        matrix = sparse()
        dense = torch.randn(64, 256, requires_grad=True)
        expected = torch.autograd.grad((matrix @ dense).square().sum(), dense)[0]
        with offload:
            got = torch.autograd.grad((matrix @ dense).square().sum(), dense)[0]
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_kept(offload, layout):
    torch.manual_seed(0)
    layer, rows = nn.Linear(64, 64), [torch.randn(n, 64) for n in (300, 500)]

    def gradient(context):
        with context:
            nested = torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
            padded = torch.nested.to_padded_tensor(layer(nested * 1.5), 0.0)
        return torch.autograd.grad(padded.square().sum(), layer.weight)[0]

    assert torch.equal(gradient(offload), gradient(torch.enable_grad()))
    assert offload.report().bytes_kept >= 800 * 64 * 4 or layout is torch.jagged


class Labelled(torch.Tensor):
    """A subclass without parts: it cannot be taken apart, so it is kept."""


def test_a_subclass_without_parts_is_kept(offload):
    expected, got = save_and_restore(offload, lambda x: (x + 0).as_subclass(Labelled))
    assert type(got) is Labelled and torch.equal(got, expected)
    assert offload.report().bytes_kept == 64 * 256 * 4


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_parts_of_a_dtensor_are_moved(offload, mesh):
    def make(x):
        return distribute_tensor(x + 0, mesh, [Shard(0)])

    expected, got = save_and_restore(offload, make)
    assert isinstance(got, DTensor) and got.placements == (Shard(0),)
    assert torch.equal(got.to_local(), expected.to_local())
    assert offload.report().bytes_written == 64 * 256 * 4


def test_a_model_of_dtensors(mesh, tmp_path):
    torch.manual_seed(0)
    w = [nn.Parameter(distribute_tensor(torch.randn(200, 96), mesh, [Shard(0)])) for _ in "ab"]
    model = nn.ParameterList(w)
    x = distribute_tensor(torch.randn(200, 96), mesh, [Shard(0)])

    def loss():
        return ((x * w[0]).tanh() * w[1]).tanh().to_local().sum()

    expected = torch.autograd.grad(loss(), w)
    offload = ActivationOffload(model, tmp_path, min_bytes=0)
    with offload:
        value = loss()
        offload._cache.drain()
        got = torch.autograd.grad(value, w)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.to_local(), b.to_local())
    report = offload.report()
    assert report.bytes_excluded == 200 * 96 * 4  # w[1]: its local part is known as the model's
    assert report.bytes_written == 3 * 200 * 96 * 4  # x and the two tanh
    assert report.bytes_read == 2 * 200 * 96 * 4  # x is alive, and handed back from memory
    offload.close()


def test_a_dtensor_changed_in_place_raises(offload, mesh):
    x = distribute_tensor(torch.randn(96, 96), mesh, [Replicate()]).requires_grad_()
    with offload:
        y = x.exp()
        out = y.to_local().sum()
        offload._cache.drain()
        y.detach().add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        out.backward()


def test_changes_through_data_are_seen_as_without_an_offload(offload):
    """Autograd does not count them: backward uses the new values, and so it does here."""

    def run(context):
        x = torch.arange(64.0 * 256).view(64, 256).requires_grad_()
        with context:
            y = x * 1.0
            out = (y * y).sum()
            offload._cache.drain()
            y.data.mul_(3)
        out.backward()
        return x.grad

    assert torch.equal(run(offload), run(warnings.catch_warnings()))


def test_channels_last_convolutions(tmp_path, gradients, assert_same):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.SiLU(), nn.Conv2d(16, 8, 3)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(4, 8, 24, 24).to(memory_format=torch.channels_last)
    expected = gradients(model, lambda: model(x).square().sum().backward())
    offload = ActivationOffload(model, tmp_path, min_bytes=0)

    def step():
        with offload:
            value = model(x).square().sum()
            offload._cache.drain()
            value.backward()

    assert_same(gradients(model, step), expected)
    assert offload.report().bytes_read > 0
    offload.close()


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell])
def test_recurrent_networks(tmp_path, gradients, assert_same, kind, checksum):
    """Their gates are parts of one storage; each is changed in place and saved, then the next."""
    torch.manual_seed(0)
    model, x = kind(64, 96), torch.randn(8, 64, 64)

    def forward():
        if not kind.__name__.endswith("Cell"):
            return model(x)[0].square().mean()
        state, total = None, 0.0
        for row in x:
            state = model(row, state)
            total = total + (state[0] if isinstance(state, tuple) else state).square().mean()
        return total

    expected = gradients(model, lambda: forward().backward())
    offload = ActivationOffload(model, tmp_path, min_bytes=0, checksum=checksum)

    def step():
        with offload:
            value = forward()
            offload._cache.drain()
            value.backward()

    for _ in range(3):
        assert_same(gradients(model, step), expected)
    assert offload.report().bytes_read > 0
    offload.close()


@pytest.mark.parametrize("full", [False, True])
def test_parts_with_a_version_each_that_are_changed_in_turn(offload, monkeypatch, full):
    """Each is moved as a clone, or stays where the device has no memory for that."""

    def fails(tensor):
        raise torch.OutOfMemoryError

    if full:
        monkeypatch.setattr(torch.Tensor, "clone", fails)

    def run(context):
        x = torch.linspace(-1, 1, 128 * 128).view(128, 128).requires_grad_()
        with context:
            parts = (x * 1).unsafe_chunk(4, 1)
            out = torch.cat([part.sigmoid_() for part in parts], 1)
            del parts
            offload._cache.drain()
        out.square().sum().backward()
        return x.grad

    assert torch.equal(run(offload), run(warnings.catch_warnings()))
    assert (offload.report().bytes_written == 0) == full


@pytest.mark.parametrize("cast", [False, True])
def test_weights_of_a_network_beside_the_model_stay(tmp_path, gradients, assert_same, cast):
    """A loss may run one that is frozen, or another model that is trained with it."""
    torch.manual_seed(0)
    model, other, x = nn.Linear(96, 96), nn.Linear(96, 112), torch.randn(128, 96)
    frozen = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 64)).requires_grad_(False)
    shapes = set()
    offload = ActivationOffload(
        model,
        tmp_path,
        policy=lambda info: bool(shapes.add(tuple(info.shape))) or True,
        min_bytes=0,
    )

    def step(context):
        with context, torch.autocast("cpu", enabled=cast):
            y = model(x).tanh()
            loss = frozen(y).float().square().mean() + other(y).float().square().mean()
            loss.backward()

    expected = gradients(model, lambda: step(warnings.catch_warnings()))
    assert_same(gradients(model, lambda: step(offload)), expected)
    of_frozen = {(80, 96), (96, 80), (64, 80), (80, 64)} if not cast else set()
    assert (128, 96) in shapes
    assert not shapes & ({(96, 96), (112, 96), (96, 112)} | of_frozen), shapes
    offload.close()


@pytest.mark.parametrize("step", [1, 3])
def test_a_part_moved_alone_comes_back_as_it_lay(offload, step):
    laid = []

    class Lay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            laid.append((x.stride(), x.data_ptr() % 64))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            laid.append((x.stride(), x.data_ptr() % 64))
            return grad

    def run(context):
        # An odd width: the parts begin at odd places, and vectors and single numbers round apart.
        x = torch.linspace(-2, 2, 257 * 391).view(257, 391).requires_grad_()
        with context:
            part = (x * 1)[:, ::step].unsafe_chunk(2, 1)[1].mul_(1.3)
            out = nn.functional.gelu(Lay.apply(part)) + nn.functional.gelu(part)
            del part
            offload._cache.drain()
        out.sin().sum().backward()
        return x.grad

    for _ in range(2):  # from the second on, what backward wants first stays
        assert torch.equal(run(offload), run(warnings.catch_warnings()))
    assert offload.report().bytes_read > 0
    assert laid[0] == laid[1]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_the_gates_of_a_recurrent_network_leave_memory(tmp_path, gradients, assert_same, kind):
    torch.manual_seed(0)
    model = kind(64, 96).double()  # in single precision an LSTM saves all its steps as one
    x = torch.randn(64, 64, 64, dtype=torch.float64)
    expected = gradients(model, lambda: model(x)[0].square().mean().backward())

    def peak(policy):
        offload = ActivationOffload(
            model, tmp_path, policy=policy, min_bytes=0, in_flight_bytes=1 << 20, prefetch_bytes=0
        )

        def step():
            with offload:
                value = model(x)[0].square().mean()
                offload._cache.drain()
                value.backward()

        assert_same(gradients(model, step), expected)
        report = offload.report()
        offload.close()
        assert report.saved_bytes == 0
        return report

    kept, moved = peak(lambda info: False), peak("all")
    assert moved.peak_saved_bytes < 0.3 * kept.peak_saved_bytes
    assert moved.bytes_kept < 0.01 * kept.bytes_kept


def test_a_gate_changed_after_it_was_saved_raises(offload):
    x = torch.ones(128, 128, requires_grad=True)
    with offload:
        first, second = (x * 1).unsafe_chunk(2, 1)
        out = first.sigmoid_().sum() + second.tanh_().sum()
        offload._cache.drain()
        first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
