"""Bytes and flops that each kernel of a schedule moves and does, counted from shapes.

A stored value that is read through a map counts once per row that reads it, as a gather from memory
does; caches make it less.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from dataeff.rgnn.domains import TYPE_DOMAINS
from dataeff.rgnn.ir import Op
from dataeff.rgnn.kernels_ir import Dense, Gemm, Schedule, Step, Traversal
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.signatures import ALIASES, SEGMENT
from dataeff.rgnn.triton.tiles import GemmSchedule, Product, schedule_of
from dataeff.rgnn.view import View


@dataclass(frozen=True)
class Cost:
    """What one step moves to and from memory, and computes."""

    nbytes: int
    flops: int

    def __str__(self) -> str:
        return f"{self.nbytes / 1e6:.3f} MB, {self.flops / 1e6:.3f} Mflop"


def step_cost(schedule: Schedule, number: int, sizes: tuple[int, ...], item_size: int) -> Cost:
    """Count one step of a schedule on a graph of these sizes."""
    step: Step = schedule.steps[number]
    if isinstance(step, Traversal):
        return _traversal(schedule, number, step, sizes, item_size)
    op = schedule.program[step.op]
    operands = [schedule.program[a] for a in op.args]
    elements = _elements(op, sizes) + sum(_elements(o, sizes) for o in operands)
    if op.kind in ALIASES and _elements(op, sizes) <= _elements(operands[0], sizes):
        return Cost(0, 0)  # a view of the operand
    if isinstance(step, Dense):
        return Cost(elements * item_size, _dense_flops(schedule, op, sizes))
    assert isinstance(step, Gemm)
    product = schedule.product(step)
    if step.scatter is not None:  # what a row is added to is read and written
        moved = (_elements(schedule.program[a], sizes) for a in product.args)
        elements = sum(moved) + 2 * _elements(product, sizes)
    return Cost(elements * item_size, 2 * _multiply_adds(schedule, product, sizes))


def product_of(schedule: Schedule, step: Gemm, sizes: tuple[int, ...]) -> Product:
    """The sizes of one head of a typed product, or weight gradient, as it is carried out."""
    op = schedule.product(step)
    left, right = (schedule.program[a].type for a in op.args)
    rows = View.rows_of(sizes, left.domain)
    if op.kind == "outer":
        heads, types = prod(left.shape[:-1]), View.rows_of(sizes, str(op.attrs[0]))
        num_out = prod(right.shape) // max(heads, 1)
        return Product(True, heads, left.shape[-1], num_out, rows, types)
    batch = len(op.type.shape if op.kind == "linear_t" else left.shape) - 1
    widths = right.shape[batch], prod(right.shape[batch + 1 :])
    num_in, num_out = widths if op.kind == "linear" else reversed(widths)
    types = View.rows_of(sizes, right.domain)
    return Product(False, prod(right.shape[:batch]), num_in, num_out, rows, types)


def tile_of(
    product: Product,
    choice: Choice,
    dtype: torch.dtype,
    precision: str = "ieee",
    capability: int = 90,
) -> GemmSchedule:
    """The Triton tile of a product under a choice."""
    chosen = choice.gradient if product.gradient else choice.product
    return schedule_of(product, dtype, precision, capability, chosen=chosen)


def _dense_flops(schedule: Schedule, op: Op, sizes: tuple[int, ...]) -> int:
    """One per element of the result, or two per term of a product."""
    if op.kind != "einsum":
        return _elements(op, sizes)
    letters = str(op.attrs[0]).split("->")[0].split(",")
    axes: dict[str, int] = {}
    for names, operand in zip(letters, op.args, strict=True):
        axes |= dict(zip(names, schedule.program[operand].type.shape, strict=True))
    return 2 * View.rows_of(sizes, op.type.domain) * prod(axes.values())


def _elements(op: Op, sizes: tuple[int, ...]) -> int:
    return View.rows_of(sizes, op.type.domain) * op.type.numel


def _multiply_adds(schedule: Schedule, op: Op, sizes: tuple[int, ...]) -> int:
    """Rows times the size of one type's weight."""
    weight = op if op.kind == "outer" else schedule.program[op.args[1]]
    rows = schedule.program[op.args[0]].type.domain
    return View.rows_of(sizes, rows) * prod(weight.type.shape)


def _traversal(
    schedule: Schedule, number: int, step: Traversal, sizes: tuple[int, ...], item_size: int
) -> Cost:
    """Every unstored value is computed, and every stored one read, once per row of its reader.

    What stands on the center is the reader's own row along the kernel's map: it is held in
    registers while the inner rows pass, and counts once per center.
    """
    program = schedule.program
    elements = sum(_elements(program[s], sizes) for s in schedule.kept(number))
    flops = 0
    center = View.rows_of(sizes, step.center)
    stack = [(s, View.rows_of(sizes, program[s].type.domain)) for s in step.sinks]
    seen: set[tuple[int, int]] = set()
    while stack:
        value, rows = stack.pop()
        op = program[value]
        if (value, rows) in seen:
            continue
        seen.add((value, rows))
        if op.kind in SEGMENT:
            rows = View.rows_of(sizes, program[op.args[0]].type.domain)
        flops += _flops(schedule, op, rows, sizes)
        below = center if op.kind == "gather" and op.map == step.map else rows
        for arg in op.args:
            if arg not in schedule.stored:
                stack.append((arg, below))
            elif arg not in step.sinks and (arg, below) not in seen:
                seen.add((arg, below))
                if program[arg].type.domain in TYPE_DOMAINS:  # parameters: small, read from cache
                    below = min(below, View.rows_of(sizes, program[arg].type.domain))
                elements += below * program[arg].type.numel
    return Cost(elements * item_size, flops)


def _flops(schedule: Schedule, op: Op, rows: int, sizes: tuple[int, ...]) -> int:
    if op.kind in ("linear", "linear_t"):
        return 2 * _multiply_adds(schedule, op, sizes)
    if op.kind in ("gather", "prefix", "const", "degree", "reshape", "expand", "slice", "concat"):
        return 0
    widest = max([op.type.numel, *(schedule.program[a].type.numel for a in op.args)])
    return rows * widest
