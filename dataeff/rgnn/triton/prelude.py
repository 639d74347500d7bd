"""What generated Triton starts with: imports and elementary functions."""

from __future__ import annotations

PRELUDE = """\
import triton
import triton.language as tl


@triton.jit
def maximum(x, y):  # as torch's: what is no number stays so
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_grad(x):
    density = tl.exp(-0.5 * x * x) * 0.3989422804014327
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density

"""
