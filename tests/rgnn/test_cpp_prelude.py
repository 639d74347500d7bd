"""The elementary functions that generated C++ writes out, against PyTorch in float64."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from dataeff.rgnn.cpp.backend import FLAGS
from dataeff.rgnn.cpp.prelude import prelude
from dataeff.rgnn.cpp.toolchain import CompilerMissing, compile_cpp

_LOOP = """
extern "C" __attribute__((visibility("default")))
void run_{name}(const T* __restrict x, T* __restrict y, int64_t n) {{
  for (int64_t i = 0; i < n; ++i) y[i] = {call};
}}
"""
_SUM = """
extern "C" __attribute__((visibility("default")))
void run_log_sum(const T* x, T* y, int64_t n) {
  Exponents terms;
  for (int64_t i = 0; i < n; ++i) terms.add(x[i]);
  *y = terms.log();
}
"""
CALLS = {
    "exp": "math::exp(x[i])",
    "tanh": "math::tanh(x[i])",
    "gelu": "gelu(x[i])",
    "gelu_grad": "gelu_grad(x[i])",
}
CPP = {torch.float32: "float", torch.float64: "double"}


@pytest.fixture(params=CPP, ids=str)
def run(request):
    loops = "".join(_LOOP.format(name=n, call=c) for n, c in CALLS.items())
    try:
        library = compile_cpp(prelude(CPP[request.param], "int32_t") + loops + _SUM, flags=FLAGS)
    except CompilerMissing as missing:
        pytest.skip(str(missing))

    def call(name, x, rows=None):
        x = x.to(request.param)
        y = x.new_empty(x.numel() if rows is None else rows)
        addresses = (ctypes.c_void_p(t.data_ptr()) for t in (x, y))
        getattr(library, f"run_{name}")(*addresses, ctypes.c_int64(x.numel()))
        return x, y

    return call


def test_exp_is_right_to_a_bit_from_subnormal_results_to_infinite_ones(run):
    x, y = run("exp", torch.linspace(-110, 92, 200_003, dtype=torch.float64))
    want = x.double().exp()
    spacing = torch.nextafter(want.to(y.dtype), y.new_tensor(torch.inf)) - want.to(y.dtype)
    finite = want.to(y.dtype).isfinite()
    assert ((y.double() - want).abs() <= 1.001 * spacing.double())[finite].all()
    assert torch.equal(y[~finite], want.to(y.dtype)[~finite])


def test_exp_of_what_is_no_number(run):
    x, y = run("exp", torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -1e30]))
    torch.testing.assert_close(y, x.exp(), equal_nan=True, rtol=0, atol=0)


def test_tanh_is_right_to_three_units_in_the_last_place(run):
    small = torch.logspace(-44, 0, 50_001, dtype=torch.float64)
    x, y = run("tanh", torch.cat([torch.linspace(-12, 12, 200_003).double(), small, -small]))
    want = x.double().tanh()
    rounded = want.to(y.dtype).abs()
    spacing = torch.nextafter(rounded, y.new_tensor(torch.inf)) - rounded
    assert ((y.double() - want).abs() <= 3 * spacing.double()).all()


def test_tanh_of_what_is_no_number(run):
    x, y = run("tanh", torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e30, -1e30]))
    torch.testing.assert_close(y, x.tanh(), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(y.signbit()[3:], x.signbit()[3:])


def test_gelu_and_its_derivative(run):
    x, y = run("gelu", torch.linspace(-12, 12, 100_001, dtype=torch.float64))
    exact = x.double().requires_grad_()
    want = F.gelu(exact)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    near = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(y.double(), want.detach(), **near)
    torch.testing.assert_close(run("gelu_grad", x)[1].double(), slope, **near)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_logarithm_of_a_sum_of_exponentials(run, count, scale):
    """It is relative to the largest, and infinite without terms."""
    terms = torch.randn(count, generator=torch.Generator().manual_seed(count)) * scale
    for given in (terms, torch.cat([torch.full((20,), -torch.inf), terms])):
        x, y = run("log_sum", given, rows=1)
        want = (x.double() - x.max()).logsumexp(0) if count else x.new_tensor(torch.inf)
        torch.testing.assert_close(y[0], want.to(y.dtype), rtol=1e-6, atol=1e-6)
