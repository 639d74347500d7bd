"""Carries out a schedule: allocates, calls each step, drops what nothing reads any more."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from dataeff.memory.huge_pages import on_huge_pages
from dataeff.memory.scratch import ARENAS, SCRATCH, SMALLEST_LENT_NBYTES
from dataeff.rgnn.arena import Places, lives, passing_values, place
from dataeff.rgnn.constants import ConstantSteps
from dataeff.rgnn.gemm import typed_gemm, typed_gemm_dw, typed_gemm_sum, typed_sum
from dataeff.rgnn.interpret import run_op
from dataeff.rgnn.ir import Op
from dataeff.rgnn.kernels_ir import Gemm, Schedule, Step, Traversal
from dataeff.rgnn.memory_plan import last_uses, makes, overwritten, passing
from dataeff.rgnn.products import NativeProducts
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.structure import TypedRows
from dataeff.rgnn.triton.tiles import GemmSchedule
from dataeff.rgnn.view import View
from dataeff.rgnn.weight_products import weight_product
from dataeff.rgnn.wide_scores import HALF, dtype_in, wide_scores

NO_PLACES = Places({}, 0)
KEPT_PLACES = 64  # plans of memory, one for each size of graphs that a program has run on
RunTraversal = Callable[[int, Traversal, View, dict[int, Tensor]], None]


class Memory:
    """What one run's values stand in.

    Args:
        places: where large values that pass stand in one block, which the next run takes again.
            Those that stay are lent memory.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.block: Tensor | None = None

    def tensor(self, value: int, shape: tuple[int, ...], like: Tensor, *, stays: bool) -> Tensor:
        """Memory of any content for a value, in the dtype and on the device of `like`."""
        nbytes = prod(shape) * like.element_size()
        if (offset := self.places.offsets.get(value)) is not None:
            if self.block is None:
                self.block = ARENAS.take(self.places.nbytes)
            return self.block[offset : offset + nbytes].view(like.dtype).view(shape)
        if stays and like.device.type == "cpu" and nbytes >= SMALLEST_LENT_NBYTES:
            return SCRATCH.lend(nbytes).view(like.dtype).view(shape)
        return on_huge_pages(like.new_empty(shape))

    def close(self) -> None:
        """Return the block."""
        if self.block is not None:
            ARENAS.give(self.block)
            self.block = None


class Executor:
    """Runs a schedule with a backend's traversals.

    Args:
        schedule: what to run.
        run_traversal: called with (step number, kernel, view, values); the kernel's sinks are
            allocated in `values` and are to be filled.
        choice: the tiles of products that tuning chose.
        products: runs typed products of rows that stand by type; `gemm` does without it.
    """

    def __init__(
        self,
        schedule: Schedule,
        run_traversal: RunTraversal,
        choice: Choice | None = None,
        products: NativeProducts | None = None,
    ) -> None:
        self.schedule = schedule
        self.choice = choice or Choice()
        self.products = products
        self.run_traversal = run_traversal
        self.program = schedule.program
        self.dying: list[list[int]] = [[] for _ in schedule.steps]  # what no later step reads
        for value, last in last_uses(schedule).items():
            self.dying[last].append(value)
        self.kept = {
            n: schedule.kept(n)
            for n, step in enumerate(schedule.steps)
            if isinstance(step, Traversal)
        }
        self.wide = wide_scores(schedule.program)
        self.overwrites = overwritten(schedule)
        self.passing = passing(schedule)
        self.passing_values = passing_values(schedule)
        self.constant = ConstantSteps(schedule)
        self._placed: dict[tuple[tuple[int, ...], int], Places] = {}

    def _places(self, view: View, like: Tensor) -> Places:
        """Where large values that pass stand in one block of host memory."""
        # In half precision some values are in float32, which only Triton's interpreter meets here.
        if like.device.type != "cpu" or like.dtype in HALF:
            return NO_PLACES
        item_size = like.element_size()
        key = view.sizes, item_size
        places = self._placed.get(key)
        if places is None:
            found = lives(self.passing_values, view.sizes, item_size)
            if len(self._placed) >= KEPT_PLACES:
                self._placed.clear()
            places = self._placed[key] = place(found)
        return places

    def __call__(self, view: View, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Outputs of the program, [rows, *row shape] each."""
        values: dict[int, Tensor] = {}
        like = next(iter(inputs.values()))
        for op in self.program.inputs:
            tensor = inputs[str(op.attrs[0])].contiguous()
            values[op.id] = tensor.unsqueeze(0) if op.type.domain == "one" else tensor
        memory = Memory(self._places(view, like))
        group = self.constant.group(inputs)
        key = None if group is None else self.constant.key(view)
        known = None if group is None else group.find(key)
        values |= known or {}
        made: dict[int, Tensor] = {}
        try:
            for number, step in enumerate(self.schedule.steps):
                if known is None or number not in self.constant.numbers:
                    self._run(number, step, view, values, like, memory)
                if known is None and number in self.constant.read:
                    made |= {v: values[v] for v in makes(self.schedule, number)}
                for value in self.dying[number]:
                    values.pop(value, None)
        finally:  # a step that failed keeps no block
            memory.close()
        if group is not None and known is None:
            group.keep(key, made, self.constant.flops(view))
        return [self._result(o, values, like) for o in self.program.outputs]

    def _result(self, output: int, values: dict[int, Tensor], like: Tensor) -> Tensor:
        op = self.program[output]
        value = values[output] if output in values else like.new_full((1,), float(op.attrs[0]))  # type: ignore[arg-type]
        return value[0] if op.type.domain == "one" else value

    def _run(
        self,
        number: int,
        step: Step,
        view: View,
        values: dict[int, Tensor],
        like: Tensor,
        memory: Memory,
    ) -> None:
        if isinstance(step, Traversal):
            for sink in self.kept[number]:
                over = values.get(self.overwrites.get(number, -1))
                dtype = dtype_in(like.dtype, sink in self.wide)
                if over is not None and over.dtype == dtype:
                    values[sink] = over
                    continue
                alike = like if dtype == like.dtype else like.new_empty(0, dtype=dtype)
                values[sink] = self._memory_of(sink, view, memory, alike)
            self.run_traversal(number, step, view, values)
        elif isinstance(step, Gemm):
            run = self._gemm if step.scatter is None else self._added_up
            values[step.op] = run(number, step, view, self._as(like.dtype, step, values), memory)
        else:
            op = self.program[step.op]
            args = [self._operand(a, values, like) for a in op.args]
            if number in self.overwrites:
                here = op.args.index(self.overwrites[number])
                values[step.op] = args[here].add_(args[1 - here])
                return
            types = [self.program[a].type for a in op.args]
            if op.kind == "sum" and op.map.endswith("type") and not self._adds_by_index(op):
                values[step.op] = _sum_by_type(args[0], op.map, view)
            elif op.kind == "einsum":
                values[step.op] = weight_product(str(op.attrs[0]), *args)
            else:
                values[step.op] = run_op(op, args, types, view, {}, like).contiguous()

    def _adds_by_index(self, op: Op) -> bool:
        """Whether a sum of rows of relations, which are few, is plain PyTorch's `index_add`.

        A CPU takes it in one order and rounds once. A GPU takes it by atomic additions, in any
        order, and rounds after each.
        """
        return op.map.startswith("etype.") and self.products is not None

    def _as(self, dtype: torch.dtype, step: Gemm, values: dict[int, Tensor]) -> dict[int, Tensor]:
        """The values, with what a product reads in its dtype: scores may be wider."""
        read = [v for v in self.schedule.reads(step) if v in values and values[v].dtype != dtype]
        return values | {v: values[v].to(dtype) for v in read} if read else values

    def _memory_of(self, value: int, view: View, memory: Memory, like: Tensor) -> Tensor:
        kind = self.program[value].type
        shape = (view.num_rows(kind.domain), *kind.shape)
        return memory.tensor(value, shape, like, stays=value not in self.passing)

    def _operand(self, value: int, values: dict[int, Tensor], like: Tensor) -> Tensor:
        if value in values:
            return values[value]
        return like.new_full((1,), float(self.program[value].attrs[0]))  # type: ignore[arg-type]

    def _gemm(
        self, number: int, step: Gemm, view: View, values: dict[int, Tensor], memory: Memory
    ) -> Tensor:
        op = self.program[step.op]
        domain = self.program[op.args[0]].type.domain
        rows, other = values[step.rows], values[op.args[1]]
        target = str(op.attrs[0]) if op.kind == "outer" else self.program[op.args[1]].type.domain
        gather = None if step.gather is None else view.index(step.gather)
        types = view.typed_rows(domain, target)
        order = types.order
        if self.products is not None and self.products.take(types, gather, rows, other):
            result = self._memory_of_product(number, step, view, rows, memory)
            self.products(number, rows, other, result, types, gather)
            return result
        if order is not None:
            gather = order if gather is None else gather.index_select(0, order)
        if op.kind == "outer":
            other = other if order is None else other.index_select(0, order)
            gradient = _outer(rows, other, types, gather, self.choice.gradient)
            return gradient.reshape(types.pointers.numel() - 1, *op.type.shape)
        batch = len(op.type.shape) - 1 if op.kind == "linear_t" else rows.dim() - 2
        overwrite = order is None and number in self.overwrites
        out = None
        if order is None and not overwrite and rows.device.type == "cpu":
            out = self._memory_of(step.op, view, memory, rows)
        result = _linear(
            *(rows, other, types, gather, batch, op.kind == "linear_t"),
            overwrite_x=overwrite,
            out=out,
            tile=self.choice.product,
        )
        result = result.reshape(result.shape[0], *op.type.shape)
        if order is None:
            return result
        unsorted = self._memory_of(step.op, view, memory, rows)
        return unsorted.index_copy_(0, order.long(), result)

    def _memory_of_product(
        self, number: int, step: Gemm, view: View, rows: Tensor, memory: Memory
    ) -> Tensor:
        """That of the result, which may be that of the rows."""
        op = self.program[step.op]
        shape = (view.num_rows(op.type.domain), *op.type.shape)
        if number in self.overwrites and prod(shape) == rows.numel():
            return rows.view(shape)
        if op.kind == "outer":
            return on_huge_pages(rows.new_empty(shape))
        return self._memory_of(step.op, view, memory, rows)

    def _added_up(
        self, number: int, step: Gemm, view: View, values: dict[int, Tensor], memory: Memory
    ) -> Tensor:
        """Products of pairs, added up at their node."""
        product = self.schedule.product(step)
        assert step.scatter is not None
        rows, weight = values[step.rows], values[product.args[1]]
        onto = self.schedule.onto(step)
        if number in self.overwrites:
            out = values[self.overwrites[number]]
        else:
            out = self._memory_of(step.op, view, memory, rows)
            if onto is not None:
                out.copy_(values[onto])
        types = view.typed_rows(self.program[product.args[0]].type.domain, "etype")
        target = view.index(step.scatter)
        gather = None if step.gather is None else view.index(step.gather)
        if self.products is not None and self.products.take(types, gather, rows, weight):
            add = onto is not None
            self.products(number, rows, weight, out, types, gather, target, add)
            return out
        heads = len(product.type.shape) - 1 if product.kind == "linear_t" else rows.dim() - 2
        x, weight = _by_head(rows, weight, heads, product.kind == "linear_t")
        typed_gemm_sum(
            x,
            weight,
            types.pointers,
            target,
            out.view(out.shape[0], *weight.shape[1:-2], weight.shape[-1]),
            gather=gather,
            add=onto is not None,
        )
        return out


def _sum_by_type(x: Tensor, name: str, view: View) -> Tensor:
    source, _, target = name.partition(".")
    types = view.typed_rows(source, target)
    rows = x.reshape(x.shape[0], prod(x.shape[1:]))
    sums = typed_sum(rows, types.pointers, gather=types.order, chunk_map=types.tiles)
    return sums.reshape(types.pointers.numel() - 1, *x.shape[1:])


def _linear(
    x: Tensor,
    w: Tensor,
    types: TypedRows,
    gather: Tensor | None,
    batch: int,
    transpose: bool,
    *,
    overwrite_x: bool = False,
    out: Tensor | None = None,
    tile: GemmSchedule | None = None,
) -> Tensor:
    rows, weight = _by_head(x, w, batch, transpose)
    if out is not None:
        out = out.view(out.shape[0], *weight.shape[1:-2], weight.shape[-1])
    return typed_gemm(
        rows,
        weight,
        types.pointers,
        gather=gather,
        tile_map=types.tiles,
        overwrite_x=overwrite_x,
        out=out,
        tile=tile,
    )


def _by_head(x: Tensor, w: Tensor, batch: int, transpose: bool) -> tuple[Tensor, Tensor]:
    """Rows [.., in] and weights [types, in, out], with an axis of heads if there are several."""
    heads, width = prod(w.shape[1 : batch + 1]), w.shape[batch + 1]
    weight = w.reshape(w.shape[0], heads, width, prod(w.shape[batch + 2 :]))
    if transpose:
        weight = weight.transpose(2, 3)
    rows = x.reshape(x.shape[0], heads, weight.shape[2])
    return (rows[:, 0], weight[:, 0]) if heads == 1 else (rows, weight)


def _outer(
    x: Tensor,
    y: Tensor,
    types: TypedRows,
    gather: Tensor | None,
    tile: GemmSchedule | None,
) -> Tensor:
    heads, width = prod(x.shape[1:-1]), x.shape[-1]
    left = x.reshape(x.shape[0], heads, width)
    right = y.reshape(y.shape[0], heads, prod(y.shape[1:]) // heads)
    if heads == 1:
        left, right = left[:, 0], right[:, 0]
    return typed_gemm_dw(
        left, right, types.pointers, gather=gather, chunk_map=types.tiles, tile=tile
    )
