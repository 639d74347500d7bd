"""C++ for sums, maxima and sums of exponentials over the inner rows of a center row."""

from __future__ import annotations

from dataeff.rgnn.cpp.text import Block, Ref, flat, loops
from dataeff.rgnn.ir import Op


def start(op: Op, outer: Block) -> str:
    """Declare the accumulator of a reduction before the loop; returns its name."""
    name, size = f"acc{op.id}", op.type.numel
    first = "T(0)" if op.kind == "sum" else "-kInfinity"
    outer.add(f"T {name}[{size}]; for (int j = 0; j < {size}; ++j) {name}[j] = {first};")
    if op.kind == "logsum":
        outer.add(f"Exponents {name}_of[{size}];")
    return name


def accumulate(op: Op, name: str, value: Ref, inner: Block) -> None:
    """Add one inner row."""
    index, head, tail = loops(op.type.shape)
    place = flat(index, op.type.shape)
    item = value.at(index)
    if op.kind == "sum":
        body = f"{name}[{place}] += {item};"
    elif op.kind == "logsum":
        body = f"{name}_of[{place}].add({item});"
    else:
        body = f"{name}[{place}] = math::maximum({name}[{place}], {item});"
    inner.add(f"{head}{body}{tail}")


def take_top(op: Op, name: str, logsum: str, outer: Block) -> None:
    """The maximum that a finished `logsum` is relative to."""
    outer.add(f"for (int j = 0; j < {op.type.numel}; ++j) {name}[j] = {logsum}_of[j].top;")


def finish(op: Op, name: str, outer: Block, empty: str) -> None:
    """Turn the accumulator into the result, behind the loop; `empty` says it had no rows."""
    size = op.type.numel
    if op.kind == "sum":
        return
    if op.kind == "logsum":
        each = f"{name}[j] = {name}_of[j].log();"
    else:
        each = f"if ({empty}) {name}[j] = T(0);"
    outer.add(f"for (int j = 0; j < {size}; ++j) {each}")
