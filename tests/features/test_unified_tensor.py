"""Unified tensors: where each operation's result is, and that they are tensors like others.

Where there is no GPU, the meta device stands for it: it decides placement as a GPU does.
"""

import copy
import io
import pickle
import sys
import weakref
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dataeff
from dataeff.features import UnifiedTensor, unified_memory

sys.path.insert(0, str(Path(__file__).parent))

META = torch.device("meta")
# torch's own, while it compiles
WARNS = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def compiling(test):
    """Lets a test compile although warnings are errors."""
    for mark in WARNS:
        test = mark(test)
    return test


INDEX = torch.tensor([3, 0, 3])


@pytest.fixture
def x():
    return torch.arange(24.0).view(6, 4)


def other(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=META)


def ids(*shape):
    return other(*shape, dtype=torch.long)


UNIFIED, CPU, GPU = "unified", "cpu", "gpu"
RULES = {
    # the four gathers, by a GPU's index and by the CPU's
    "u[i] gpu": (lambda u: u[ids(3)], GPU),
    "u[i] gpu int32": (lambda u: u[ids(3).int()], GPU),
    "u[2d i] gpu": (lambda u: u[ids(3, 2)], GPU),
    "u[mask, i] gpu": (lambda u: u[:, ids(2)], GPU),
    "index_select gpu": (lambda u: u.index_select(0, ids(3)), GPU),
    "index_select dim 1 gpu": (lambda u: torch.index_select(u, 1, ids(3)), GPU),
    "embedding gpu": (lambda u: F.embedding(ids(3, 2), u, padding_idx=-1), GPU),
    "gather gpu": (lambda u: torch.gather(u, 1, ids(6, 2)), GPU),
    "take_along_dim gpu": (lambda u: torch.take_along_dim(u, ids(6, 1), 1), GPU),
    "u[i] cpu": (lambda u: u[INDEX], CPU),
    "index_select cpu": (lambda u: u.index_select(0, INDEX), CPU),
    "embedding cpu": (lambda u: F.embedding(INDEX, u), CPU),
    "gather cpu": (lambda u: u.gather(0, INDEX[:, None]), CPU),
    "u[rows] of a list": (lambda u: u[[1, 2]], CPU),
    # arithmetic and the rest
    "gpu operand": (lambda u: u + other(6, 4), GPU),
    "gpu operand first": (lambda u: other(6, 4) * u, GPU),
    "gpu in a list": (lambda u: torch.cat([u, other(1, 4)]), GPU),
    "gpu by keyword": (lambda u: torch.add(u, other=other(4)), GPU),
    "gpu scalar": (lambda u: u * other(), GPU),
    "linear gpu": (lambda u: F.linear(other(2, 4), u), GPU),
    "where gpu": (lambda u: torch.where(other(6, 4, dtype=torch.bool), u, 0.0), GPU),
    "type of a gpu's": (lambda u: u.to(other(1)), GPU),
    "cpu operand": (lambda u: u + torch.ones(6, 4), CPU),
    "number": (lambda u: u * 2, CPU),
    "cpu scalar": (lambda u: u * torch.tensor(2.0), CPU),
    "alone": (lambda u: u.sum(), CPU),
    "two unified": (lambda u: u @ u.t(), CPU),
    "named tuple": (lambda u: u.max(0).values, CPU),
    "half": (lambda u: u.half(), CPU),
    "zeros_like": (lambda u: torch.zeros_like(u), CPU),
    "cpu()": (lambda u: u.cpu(), CPU),
    "to(gpu)": (lambda u: u.to(META), GPU),
    # the same memory
    "slice": (lambda u: u[2:5], UNIFIED),
    "row": (lambda u: u[3], UNIFIED),
    "view": (lambda u: u.view(-1), UNIFIED),
    "view_as gpu": (lambda u: u.view_as(other(3, 8)), UNIFIED),
    "t": (lambda u: u.t(), UNIFIED),
    ".T": (lambda u: u.T, UNIFIED),
    "detach": (lambda u: u.detach(), UNIFIED),
    ".data": (lambda u: u.data, UNIFIED),
    "split": (lambda u: u.split(2)[1], UNIFIED),
    "iterated": (lambda u: next(iter(u)), UNIFIED),
    "to(same dtype)": (lambda u: u.to(torch.float32), UNIFIED),
    # in place
    "in place, cpu": (lambda u: u.add_(1), UNIFIED),
    "in place, gpu": (lambda u: u.add_(other(4)), UNIFIED),
    "in place function, gpu": (lambda u: torch.add(u, other(4), out=u), UNIFIED),
    "augmented, gpu": (lambda u: u.__iadd__(other(4)), UNIFIED),
    # copies
    "clone": (lambda u: u.clone(), UNIFIED),
    "torch.clone": (lambda u: torch.clone(u), UNIFIED),
    "deepcopy": (lambda u: copy.deepcopy(u), UNIFIED),
    "parameter": (lambda u: torch.nn.Parameter(u), UNIFIED),
}


@pytest.mark.parametrize("name", RULES)
def test_where_the_result_is(x, name):
    run, where = RULES[name]
    u = dataeff.unified(x)
    result = run(u)
    assert isinstance(result, UnifiedTensor) == (where == UNIFIED), type(result)
    assert result.device == (META if where == GPU else torch.device("cpu"))
    if where != GPU and not name.startswith("in place"):
        plain = run(x)
        assert torch.equal(result, plain) if where == CPU else torch.equal(result.cpu(), plain)


def test_what_is_in_place_returns_the_tensor_itself(x):
    u = dataeff.unified(x)
    assert u.add_(1) is u and u.add_(other(4)) is u and torch.add(u, 1, out=u) is u
    u[ids(2)] = 1.0
    u[INDEX] = 9.0
    assert x[3].tolist() == [9] * 4


def test_it_is_the_memory_it_was_made_of(x):
    u = dataeff.unified(x)
    x[1, 2] = -1
    assert u[1, 2] == -1 and u.numpy()[1, 2] == -1 and u.data_ptr() == x.data_ptr()
    u.numpy()[0] = 8
    view = u[2:].t()
    del u
    view.fill_(3)
    assert x[0].tolist() == [8] * 4 and x[2:].unique().tolist() == [3]
    assert view.shape == (4, 4) and len(view) == 4 and view.device.type == "cpu"
    assert repr(dataeff.unified(torch.ones(2))) == "unified(tensor([1., 1.]))"
    assert f"{dataeff.unified(torch.ones(2))[0]:.2f}" == "1.00"


def test_it_keeps_the_storage_alive():
    array = np.arange(12.0)
    alive = weakref.ref(array)
    u = dataeff.unified(torch.from_numpy(array))[2:]
    del array
    assert alive() is not None and u.sum() == sum(range(2, 12))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0], TypeError, r"list: torch\.as_tensor\(x\)"),
        (torch.eye(3).to_sparse(), TypeError, r"sparse_coo: x\.to_dense"),
        (torch.empty(3, device="meta"), ValueError, "meta"),
        (torch.ones(3, requires_grad=True) * 2, ValueError, r"x\.detach"),
    ],
)
def test_what_no_unified_tensor_is_made_of(x, error, words):
    with pytest.raises(error, match=words):
        dataeff.unified(x)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_quantised_tensors_are_refused():
    x = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"quint8.*dequantize"):
        dataeff.unified(x)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,)])
def test_small_and_empty_shapes(shape):
    u = dataeff.unified(torch.ones(shape))
    assert (u + 1).shape == shape and (u + other(*shape)).device == META
    assert u.clone().shape == shape and dataeff.unified(u).shape == shape


# --- the rest of PyTorch --------------------------------------------------------------------------


def test_a_leaf_trains_like_a_plain_one(x):
    plain = torch.nn.Parameter(x.clone())
    u = torch.nn.Parameter(dataeff.unified(x))
    assert isinstance(u, UnifiedTensor) and u.is_leaf
    for weight in (plain, u):
        optimizer = torch.optim.Adam([weight], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.embedding(INDEX, weight).square().sum().backward()
            optimizer.step()
    assert torch.equal(x, plain.detach()) and type(u.grad) is torch.Tensor


@compiling
def test_compiles_as_one_graph(x):
    u = dataeff.unified(x.clone().requires_grad_())
    plain = x.requires_grad_()

    def step(u, index):
        return (F.embedding(index, u) * u[1:2]).sum() + u.index_select(0, index).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for weight, run in ((u, compiled), (plain, step)):
        run(weight, INDEX).backward()
    torch.testing.assert_close(u.grad, plain.grad)


@compiling
def test_inductor_compiles_it(x):
    compiled = torch.compile(lambda u, index: u[index] * u.shape[0], fullgraph=True)
    assert torch.equal(compiled(dataeff.unified(x), INDEX), x[INDEX] * len(x))


class Weighted(torch.nn.Module):
    def __init__(self, u):
        super().__init__()
        self.register_buffer("u", u)

    def forward(self, index):
        return self.u[index] * 2


@compiling
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exports_as_a_buffer(x, strict):
    program = torch.export.export(Weighted(dataeff.unified(x)), (INDEX,), strict=strict)
    assert torch.equal(program.module()(INDEX), x[INDEX] * 2)


@compiling
def test_compiles_for_an_index_and_operands_on_the_device(x):
    u = dataeff.unified(x)

    def step(u, index, weight):
        return u[index] @ weight + torch.gather(u, 0, index[:, None]), u * weight.sum()

    rows, product = torch.compile(step, fullgraph=True, backend="aot_eager")(u, ids(3), other(4, 2))
    assert rows.shape == (3, 2) and rows.device == product.device == META
    with pytest.raises(Exception, match="compiled function cannot write"):
        torch.compile(lambda u, y: u.add_(y), fullgraph=True, backend="aot_eager")(u, other(4))


def test_pickle_copies_and_keeps_the_kind(x):
    u = dataeff.unified(x.requires_grad_(), propagate=True)
    again = pickle.loads(pickle.dumps(u))
    assert type(again) is type(u) and again.requires_grad and torch.equal(again.cpu(), x)
    file = io.BytesIO()
    torch.save({"u": u}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["u"]
    assert type(loaded) is type(u) and loaded.data_ptr() != u.data_ptr()
    with pytest.raises(RuntimeError, match="leaves"):
        copy.deepcopy(u.view(-1))


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda u: pickle.loads(pickle.dumps(u)),
        lambda u: pickle.loads(ForkingPickler.dumps(u)),
    ],
    ids=["deepcopy", "copy", "pickle", "sent"],
)
def test_a_copy_of_a_parameter_is_a_parameter(x, copied):
    module = torch.nn.Module()
    module.u = torch.nn.Parameter(dataeff.unified(x))
    again = copied(module.u)
    assert isinstance(again, torch.nn.Parameter) and isinstance(again, UnifiedTensor)
    module.u = again  # which takes parameters alone
    assert not isinstance(copied(dataeff.unified(x)), torch.nn.Parameter)


def test_a_file_loads_to_another_device(x):
    file = io.BytesIO()
    torch.save({"u": torch.nn.Parameter(dataeff.unified(x))}, file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta")["u"]
    assert type(loaded) is torch.Tensor and isinstance(loaded, torch.nn.Parameter)
    assert loaded.device == META and loaded.shape == x.shape


def test_a_module_with_one_round_trips_its_state(x):
    module = torch.nn.Module()
    module.register_buffer("features", dataeff.unified(x))
    state = copy.deepcopy(module.state_dict())
    x.zero_()
    module.load_state_dict(state)
    assert x.view(-1).tolist() == list(range(24))
    assert isinstance(module.features, UnifiedTensor)


def test_a_table_takes_one(x):
    table = dataeff.FeatureTable(dataeff.unified(x))
    assert torch.equal(table[INDEX], x[INDEX]) and type(table.x) is torch.Tensor


def test_registering_says_that_there_is_no_gpu(x, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device"):
        dataeff.unified(x).register()
    dataeff.unified(x).synchronize()  # nothing is under way


def test_the_host_waits_for_what_another_thread_queues_meanwhile(cuda_double, monkeypatch):
    """An event that is recorded anew while the host waits for it is waited for again."""
    cuda, device = cuda_double, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    memory = unified_memory.UnifiedMemory(torch.zeros(4))
    memory.used(device, wrote=True)
    (event,) = memory._written.values()
    synchronize = event.synchronize

    def and_then_another_thread_writes():
        synchronize()
        memory.used(device, wrote=True)
        cuda.current = cuda.stream("another")
        memory.used(device, wrote=True)

    event.synchronize = and_then_another_thread_writes
    memory.wait(to_write=False)
    event.synchronize = synchronize
    cuda.log.clear()
    memory.wait(to_write=False)
    names = {"reader", "another"}
    assert set(cuda.log) == {("host waits for event of", name) for name in names}
    assert not memory._written


def test_a_forked_child_does_not_wait_for_the_parent_s_events(cuda_double, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    memory = unified_memory.UnifiedMemory(torch.zeros(4))
    memory.used(torch.device("cuda"), wrote=True)
    monkeypatch.setattr("os.getpid", lambda: -1)
    cuda_double.log.clear()
    memory.wait(to_write=True)
    assert cuda_double.log == []


def test_deepcopy_copies_the_gradient_as_torch_does():
    u = dataeff.unified(torch.ones(3)).requires_grad_()
    (u * 2).sum().backward()
    clone = copy.deepcopy(u)
    assert clone.grad.tolist() == [2, 2, 2] and clone.grad is not u.grad
    clone.grad.zero_()
    assert u.grad.tolist() == [2, 2, 2]


def test_memory_that_sharing_moves_a_tensor_out_of_is_let_go():
    u = dataeff.unified(torch.randn(6, 3))
    left = weakref.ref(u._unified)
    ForkingPickler.dumps(u)
    assert left() is None
    kept = weakref.ref(u._unified)
    ForkingPickler.dumps(u)  # it is shared already
    assert kept() is not None and kept() is u._unified


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by jvp, in torch itself
def test_transforms_of_torch_func_pass_through():
    x = torch.randn(6, 3)
    u, index = dataeff.unified(x.clone()), torch.tensor([[4], [1]])  # torch 2.10 maps no u[scalar]
    func = torch.func
    assert torch.equal(func.vmap(lambda i: u[i])(index), x[index])
    assert torch.equal(func.vmap(lambda row: row.sum())(u), x.sum(1))
    assert torch.equal(
        func.jvp(lambda t: t * 3, (u,), (torch.ones(6, 3),))[1], x.new_full((6, 3), 3)
    )
    assert torch.equal(func.grad(lambda t: (t * t).sum())(u), 2 * x)
    assert torch.equal(func.hessian(lambda t: (t**3).sum())(u[0]), torch.diag(6 * x[0]))
