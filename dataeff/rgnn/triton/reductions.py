"""Triton for sums, maxima and sums of exponentials over the inner rows of a center row.

Sums are taken a block of rows at a time, in one fixed order and without atomics.
"""

from __future__ import annotations

from dataeff.rgnn.ir import Op
from dataeff.rgnn.triton.text import Block, padded, trail

_LOWEST = 'float("-inf")'


def start(op: Op, outer: Block, dtype: str) -> None:
    """Set the accumulator `acc<id>` before the loop; `sum<id>` stands beside that of a logsum."""
    shape = ", ".join(["ROWS", *map(str, padded(op.type.shape))])
    first = "0.0" if op.kind == "sum" else _LOWEST
    outer.add(f"acc{op.id} = tl.full([{shape}], {first}, {dtype})")
    if op.kind == "logsum":
        outer.add(f"sum{op.id} = tl.zeros([{shape}], {dtype})")


def accumulate(op: Op, value: str, inner: Block, dtype: str) -> None:
    """Add one block of inner rows."""
    acc, mask = f"acc{op.id}", trail("e_mask", len(op.type.shape))
    sizes = _sizes(op)
    # A value that does not depend on the inner row still counts once for each of them.
    full = f"({value}) + tl.zeros([LANES{sizes}], {dtype})"

    def by_row(text: str) -> str:  # a leading axis of BLOCK inner rows, then one of center rows
        return f"tl.reshape({text}, [BLOCK, ROWS{sizes}])"

    if op.kind == "sum":
        inner.add(f"{acc} += tl.sum({by_row(f'tl.where({mask}, {full}, 0)')}, 0)")
        return
    item = f"item{op.id}"
    inner.add(f"{item} = {by_row(f'tl.where({mask}, {full}, {_LOWEST})')}")
    if op.kind != "logsum":
        inner.add(f"{acc} = maximum({acc}, tl.reduce({item}, 0, maximum))")
        return
    _add_exponentials(op, inner)


def _add_exponentials(op: Op, inner: Block, times: str = "") -> None:
    """Add those of `item`, each so many times, to a sum that is relative to the maximum."""
    acc, item, top, safe = (f"{stem}{op.id}" for stem in ("acc", "item", "top", "safe"))
    # The maximum may pass over what is no number: the sum of exponentials does not.
    inner.add(f"{top} = tl.maximum({acc}, tl.max({item}, 0))")
    inner.add(f"{safe} = tl.where({top} == {_LOWEST}, 0, {top})")
    inner.add(
        f"sum{op.id} = sum{op.id} * tl.exp({acc} - {safe})"
        f" + tl.sum({times}tl.exp({item} - tl.expand_dims({safe}, 0)), 0)"
    )
    inner.add(f"{acc} = {top}")


def accumulators(op: Op) -> tuple[str, ...]:
    """The variables that hold what has been added up so far."""
    return (f"acc{op.id}", f"sum{op.id}") if op.kind == "logsum" else (f"acc{op.id}",)


def merge(op: Op, parts: list[str], inner: Block, dtype: str) -> None:
    """Add a block of what others have added up, in the order of `accumulators`."""
    if op.kind != "logsum":
        accumulate(op, parts[0], inner, dtype)
        return
    mask, sizes = trail("e_mask", len(op.type.shape)), _sizes(op)
    item, amount = (f"{stem}{op.id}" for stem in ("item", "amount"))
    for name, part, none in ((item, parts[0], _LOWEST), (amount, parts[1], "0")):
        inner.add(f"{name} = tl.reshape(tl.where({mask}, {part}, {none}), [BLOCK, ROWS{sizes}])")
    _add_exponentials(op, inner, f"{amount} * ")


def take_top(op: Op, logsum: int, outer: Block) -> None:
    """The maximum that the sum of a logsum, not finished yet, is relative to."""
    outer.add(f"acc{op.id} = acc{logsum}")


def finish(op: Op, outer: Block) -> None:
    """Turn the accumulator into the result, behind the loop from `first` to `last`."""
    acc = f"acc{op.id}"
    if op.kind == "logsum":
        outer.add(f'{acc} = tl.log(tl.where(sum{op.id} == 0, float("inf"), sum{op.id}))')
    elif op.kind != "sum":
        empty = trail("(first == last)", len(op.type.shape))
        outer.add(f"{acc} = tl.where({empty}, 0, {acc})")


def _sizes(op: Op) -> str:
    return "".join(f", {n}" for n in padded(op.type.shape))
