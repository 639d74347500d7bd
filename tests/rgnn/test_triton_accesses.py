"""What `watched_accesses` refuses, shown on kernels that are wrong."""

import sys

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError
from triton_accesses import watched_accesses

from dataeff.kernels.interpreter import interpreted

N, BLOCK = 24, 8


@triton.jit
def shifted(X, Y, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n)
    tl.store(Y + i + SHIFT, x, mask=i < n)


@triton.jit
def scattered(X, Index, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n)
    tl.store(Y + tl.load(Index + i, mask=i < n), x, mask=i < n)


@triton.jit
def read_back(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n), mask=i < n)
    y = tl.load(Y + i, mask=i < n)
    tl.store(X + i, y, mask=i < n)


def run(kernel, *tensors, n=N, **constants):
    with watched_accesses() as names, interpreted(sys.modules[__name__]):
        getattr(sys.modules[__name__], kernel)[(-(-n // BLOCK),)](
            *tensors, n, BLOCK=BLOCK, **constants
        )
    return names


def test_a_kernel_whose_programs_keep_apart_passes():
    x, y = torch.randn(N), torch.zeros(N)
    assert run("shifted", x, y, SHIFT=0) == ["shifted"] and torch.equal(x, y)
    run("shifted", x, x, SHIFT=0)  # in place: each element its program's own


def test_lanes_that_the_mask_holds_back_touch_nothing():
    x, y = torch.randn(N - 3), torch.zeros(N - 3)
    run("shifted", x, y, n=N - 3, SHIFT=0)


@pytest.mark.parametrize("shift", [1, -1])
def test_outside_of_a_tensor(shift):
    whole = torch.zeros(3 * N)  # the memory is there, but not this tensor's
    with pytest.raises(InterpreterError, match=r"shifted: program \d writes outside"):
        run("shifted", torch.randn(N), whole[N : 2 * N], SHIFT=shift)
    assert (whole[:N] == 0).all() and (whole[2 * N :] == 0).all()


def test_outside_of_a_tensor_when_read():
    with pytest.raises(InterpreterError, match=r"program 2 reads outside.* bytes from X"):
        run("shifted", torch.randn(2 * N)[: N - 1], torch.zeros(N), SHIFT=0)


def test_an_index_that_repeats():
    index = torch.arange(N)
    index[1] = 2
    with pytest.raises(InterpreterError, match=r"two lanes of program 0 write Y \+ 8 bytes"):
        run("scattered", torch.randn(N), index, torch.zeros(N))
    index[1] = 9
    with pytest.raises(AssertionError, match=r"two programs write Y \+ 36 bytes"):
        run("scattered", torch.randn(N), index, torch.zeros(N))


def test_one_program_reads_what_another_writes():
    x = torch.randn(N + 1)
    with pytest.raises(AssertionError, match=r"reads what another writes: X \+ 32 bytes"):
        run("shifted", x, x, SHIFT=1)


def test_what_a_program_stored_it_may_not_load():
    with pytest.raises(InterpreterError, match="program 0 loads what it has stored"):
        run("read_back", torch.randn(N), torch.zeros(N))
