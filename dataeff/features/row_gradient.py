"""The gradient of a gather: only the touched rows, duplicates summed in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dataeff import _core
from dataeff.features.gather import gather
from dataeff.memory.cuda import refuse_in_capture
from dataeff.memory.scratch import new_on_host


def sparse_row_gradient(
    index: Tensor, grad_rows: Tensor, shape: torch.Size, padding_idx: int | None = None
) -> Tensor:
    """The gradient of `table` in `rows = table[index]`, as touched rows in host memory.

    Rows of equal indices are summed in the order of the index, so that they are the same bits at
    any number of threads. (`coalesce()` sums them in the order that the processor's sort leaves
    them in.) Rows of half precision are summed in float32 and rounded once: in bfloat16, 1 added to
    256 is 256. On CUDA the sum is made there, by a stable sort and a segmented sum, so that only
    unique rows cross the bus.

    Args:
        index: any shape, each in [-num_rows, num_rows).
        grad_rows: [*index.shape, *shape[1:]], on the index's device.
        shape: the table's.
        padding_idx: a row that gets no gradient.

    Returns:
        A coalesced sparse COO tensor of that shape, one sparse dimension, on the CPU.

    Raises:
        IndexError: an index on CUDA is out of range. The gather made its row zero; here it would be
            written to memory of others.
        RuntimeError: a CUDA graph is being captured.
    """
    if index.is_cuda:
        refuse_in_capture(
            "the gradient of rows in host memory",
            "capture what follows the rows, embedding(index).detach().requires_grad_()",
        )
    at_once = _core.sum_rows_tensors(
        index,
        grad_rows.contiguous(),
        shape[0],
        -1 if padding_idx is None else padding_idx,
        lambda size: _new_sums(grad_rows, (size, *shape[1:])),
    )
    if at_once is not None:
        return _sparse(*at_once, shape, True)
    flat = index.reshape(-1).long()
    flat = torch.where(flat < 0, flat + shape[0], flat)
    values = grad_rows.reshape(flat.numel(), *shape[1:])
    if padding_idx is not None:
        kept = flat != padding_idx
        flat, values = flat[kept], values[kept]
    flat, values = sum_rows_by_segments(flat, values)
    flat, values = flat.cpu(), values.cpu()
    _check_ends(flat, shape[0])
    return _sparse(flat[None], values, shape, True)


def _new_sums(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    ids = torch.empty(1, shape[0], dtype=torch.int64, device="cpu")
    return ids, new_on_host(like, shape, like.dtype)


def tell_coalesced(weight: Tensor) -> None:
    """Lets the gradients that autograd leaves in `weight` say that they are coalesced.

    It takes the tensors of a gradient into a new one, which has forgotten it, so that optimizers
    would sort it and sum it again.
    """
    hooks = weight._post_accumulate_grad_hooks
    if weight.is_leaf and weight.requires_grad and _look_again not in (hooks or {}).values():
        weight.register_post_accumulate_grad_hook(_look_again)


def _look_again(weight: Tensor) -> None:
    grad = weight.grad
    if grad is None or not grad.is_sparse or grad.is_coalesced():
        return
    ids = grad._indices()
    if len(ids) == 1 and ids.is_contiguous() and ids.is_cpu:
        grad._coalesced_(_core.strictly_ascending(ids.data_ptr(), ids.shape[1]))


def _check_ends(ascending: Tensor, num_rows: int) -> None:
    for row in ascending[[0, -1]].tolist() if len(ascending) else ():
        if not 0 <= row < num_rows:
            wrong = row if row >= 0 else row - num_rows  # as it was before it was counted from 0
            raise IndexError(
                f"index {wrong} is out of range for a table of {num_rows} rows: its gradient goes "
                "nowhere"
            )


def sparse_rows(index: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """A sparse COO tensor of rows `index`, [n], that are known to be in range."""
    return _sparse(index[None], rows, shape, None)


# torch 2.11 warns that this checks nothing, when told not to as well.
_PUBLIC_IS_QUIET = torch.__version__ >= (2, 13)  # type: ignore[operator]


def _sparse(ids: Tensor, rows: Tensor, shape: torch.Size, is_coalesced: bool | None) -> Tensor:
    if _PUBLIC_IS_QUIET:  # in a third of the time
        return torch.sparse_coo_tensor(
            ids, rows, shape, check_invariants=False, is_coalesced=is_coalesced
        )
    make = torch.ops.aten._sparse_coo_tensor_unsafe.default
    sparse: Tensor = make(ids, rows, shape, is_coalesced=is_coalesced)
    return sparse


def sum_rows_by_segments(index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unique indices, ascending, and for each the sum of its rows in their order; no atomics.

    Args:
        index: [n], int64.
        rows: [n, ...], floating point or complex.
    """
    if rows.is_complex():
        unique, sums = sum_rows_by_segments(index, torch.view_as_real(rows))
        return unique, torch.view_as_complex(sums)
    order = torch.sort(index, stable=True)
    unique, counts = torch.unique_consecutive(order.values, return_counts=True)
    if not len(unique):
        return unique, rows[:0]
    matrix = rows.reshape(len(index), -1)[order.indices]
    if rows.dtype.itemsize < 4:
        matrix = matrix.float()
    sums = torch.segment_reduce(matrix, "sum", lengths=counts, axis=0)
    return unique, sums.to(rows.dtype).reshape(len(unique), *rows.shape[1:])


class GatherRows(torch.autograd.Function):
    """`table[index]` by the zero-copy gather, differentiable in the table.

    The gradient is in host memory like the table: sparse, or dense as plain indexing gives it.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, index: Tensor, sparse: bool, padding_idx: int | None
    ) -> Tensor:
        """Gathers to where the index is."""
        ctx.save_for_backward(index)
        ctx.shape, ctx.sparse, ctx.padding_idx = table.shape, sparse, padding_idx
        rows = (
            None if torch.compiler.is_compiling() else _core.gather_tensors(table, index, None, 0)
        )
        return gather(table.detach(), index) if rows is None else rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Sums the rows of equal indices."""
        (index,) = ctx.saved_tensors
        if torch.is_grad_enabled() and grads[0].requires_grad:  # create_graph=True
            of = ctx.shape, ctx.sparse, ctx.padding_idx
            return _RowGradient.apply(grads[0], index, *of), None, None, None  # type: ignore[no-untyped-call]
        if torch.compiler.is_compiling() and not ctx.sparse:
            return dense_row_gradient(index, grads[0], ctx.shape, ctx.padding_idx), None, None, None
        grad = sparse_row_gradient(index, grads[0], ctx.shape, ctx.padding_idx)
        return grad if ctx.sparse else grad.to_dense(), None, None, None


class _RowGradient(torch.autograd.Function):
    """The gradient that `GatherRows` gives, differentiable in the gradient of the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_rows: Tensor,
        index: Tensor,
        shape: torch.Size,
        sparse: bool,
        padding_idx: int | None,
    ) -> Tensor:
        """Sums the rows of equal indices."""
        ctx.save_for_backward(index)
        ctx.shape, ctx.padding_idx = shape, padding_idx
        grad = sparse_row_gradient(index, grad_rows, shape, padding_idx)
        return grad if sparse else grad.to_dense()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gathers: `grad[index]`, and nothing for the padding."""
        (index,) = ctx.saved_tensors
        of_row = index.long() % ctx.shape[0]
        if grads[0].is_sparse:
            rows = grads[0].index_select(0, of_row.reshape(-1).cpu()).to_dense()
            rows = rows.reshape(*index.shape, *ctx.shape[1:]).to(index.device)
        else:
            rows = grads[0][of_row.cpu()].to(index.device)
        if ctx.padding_idx is not None:
            padded = (of_row == ctx.padding_idx).reshape(*index.shape, *[1] * (len(ctx.shape) - 1))
            rows = rows.masked_fill(padded, 0)
        return rows, None, None, None, None


# What `GatherRows.apply` calls in the end. Before that it looks for transforms (vmap) and what they
# have left behind, which takes longer than a hundred rows do.
_apply = super(torch.autograd.Function, GatherRows).apply


def gather_rows(table: Tensor, index: Tensor, sparse: bool, padding_idx: int | None) -> Tensor:
    """`GatherRows.apply` for callers that no transform of `torch.func` is around."""
    if sparse:
        tell_coalesced(table)
    rows: Tensor = _apply(table, index, sparse, padding_idx)  # type: ignore[no-untyped-call]
    return rows


def dense_row_gradient(
    index: Tensor, grad_rows: Tensor, shape: torch.Size, padding_idx: int | None
) -> Tensor:
    """The same as a dense tensor, by operators that a compiler can trace."""
    flat = index.reshape(-1).long().cpu()
    flat = torch.where(flat < 0, flat + shape[0], flat)
    values = grad_rows.reshape(flat.numel(), *shape[1:]).cpu()
    if padding_idx is not None:
        values = torch.where((flat == padding_idx).view(-1, *[1] * (values.dim() - 1)), 0, values)
    return values.new_zeros(shape).index_add_(0, flat, values)
