"""Scores of a softmax stay in float32 where a layer computes in half precision.

Forward takes the largest score and the logsumexp of a destination from scores in registers, and
backward takes the weights from what was kept of all three:

    weight = exp(score - top - logsum)

In bfloat16 a largest score between 64 and 128 is off by up to a quarter, and the weights of all
edges of that destination by the exponential of it, which nothing evens out again.
"""

from __future__ import annotations

import torch

from dataeff.rgnn.ir import Program
from dataeff.rgnn.lower import SMALL_PRODUCT
from dataeff.rgnn.memory_plan import ELEMENTWISE

HALF = (torch.bfloat16, torch.float16)
_TOTALS = ("top", "logsum")
_ALIKE = ("gather", "reshape")
_PRODUCTS = ("reduce", "linear", "sum")


def wide_scores(program: Program) -> frozenset[int]:
    """The largest scores and logsumexps, and what exponentials and they are taken of.

    Of the latter all small values, back to the products: what these read is rounded, or not, in
    forward and in backward alike. A product itself is as wide as its backend makes it.
    """
    found = {op.id for op in program.ops if op.kind in _TOTALS}
    stack = [a for op in program.ops if op.kind in (*_TOTALS, "exp") for a in op.args]
    while stack:
        op = program[stack.pop()]
        goes_on = op.kind in (*ELEMENTWISE, *_ALIKE)
        if op.id in found or op.type.numel > SMALL_PRODUCT:
            continue
        if goes_on or op.kind in _PRODUCTS:
            found.add(op.id)
            stack += op.args if goes_on else ()
    return frozenset(found)


def dtype_in(dtype: torch.dtype, wide: bool) -> torch.dtype:
    """The dtype of a value of a program that computes in `dtype`."""
    return torch.float32 if wide and dtype in HALF else dtype
