"""C++ for values of one row, out of values that it can read: formulas, sums over axes, products."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from dataeff.rgnn.cpp.text import Block, Ref, Shape, array_ref, broadcast, flat, loops
from dataeff.rgnn.ir import Op
from dataeff.rgnn.signatures import BINARY, UNARY

_FORMULA = {
    "neg": "-({0})",
    "exp": "math::exp({0})",
    "log": "math::log({0})",
    "sqrt": "math::sqrt({0})",
    "tanh": "math::tanh({0})",
    "sigmoid": "T(1) / (T(1) + math::exp(-({0})))",
    "relu": "relu({0})",
    "leaky_relu": "leaky_relu({0}, T({a}))",
    "slope": "(({0}) > T(0) ? T(1) : T({a}))",
    "gelu": "gelu({0})",
    "gelu_grad": "gelu_grad({0})",
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "maximum": "math::maximum({0}, {1})",
    "equal": "T({0} == {1})",
}


class Values:
    """Writes values into loop bodies.

    Args:
        readers: how many values of the kernel read each value.
    """

    def __init__(self, readers: dict[int, int]) -> None:
        self.readers = readers
        self.counter = 0

    def fresh(self, stem: str) -> str:
        """A name that the kernel does not use yet."""
        self.counter += 1
        return f"{stem}{self.counter}"

    def _keep(self, op: Op, ref: Ref, block: Block) -> Ref:
        """A scalar becomes a variable; a wide value read more than once becomes an array."""
        index, head, tail = loops(op.type.shape)
        if op.type.numel == 1:
            name = self.fresh("s")
            block.add(f"const T {name} = {ref.at(['0'] * len(op.type.shape))};")
            return Ref(op.type.shape, lambda index: name)
        if self.readers.get(op.id, 0) <= 1:
            return ref
        name = self.fresh("a")
        place = flat(index, op.type.shape)
        block.add(f"T {name}[{op.type.numel}]; {head}{name}[{place}] = {ref.at(index)};{tail}")
        return array_ref(name, op.type.shape)

    def elementwise(self, op: Op, refs: list[Ref], block: Block) -> Ref:
        """A formula of elements, or elements that change place."""
        shape = op.type.shape
        if op.kind in UNARY or op.kind in BINARY:
            formula = _FORMULA[op.kind]
            constant = repr(float(op.attrs[0])) if op.attrs else ""  # type: ignore[arg-type]

            def at(index: list[str]) -> str:
                parts = [r.at(broadcast(index, r.shape)) for r in refs]
                return formula.format(*parts, a=constant)

            refs = [self.narrow(r, shape, block) for r in refs]
            return self._keep(op, Ref(shape, at, lazy=True), block)
        reading = _RESHAPERS[op.kind](op, refs, self, block)
        return self._keep(op, Ref(shape, reading, lazy=True), block)

    def narrow(self, ref: Ref, shape: Shape, block: Block) -> Ref:
        """A computed operand that is broadcast is computed once, not once per reading element."""
        size = prod(ref.shape)
        if size == 1 or size == prod(shape):
            return ref
        return self.to_array(ref, block)

    def to_array(self, ref: Ref, block: Block) -> Ref:
        """Copy a value into a local array."""
        index, head, tail = loops(ref.shape)
        name = self.fresh("a")
        place = flat(index, ref.shape)
        block.add(f"T {name}[{prod(ref.shape)}]; {head}{name}[{place}] = {ref.at(index)};{tail}")
        return array_ref(name, ref.shape)

    def reduce(self, op: Op, ref: Ref, block: Block) -> Ref:
        """A sum over the axes that the result lacks or has one element of."""
        shape, full = op.type.shape, ref.shape
        if shape == full[: len(shape)] and len(shape) == len(full) - 1:
            index, head, tail = loops(shape)
            name = self.fresh("a")
            block.add(f"T {name}[{max(prod(shape), 1)}];")
            item = ref.at([*index, "k"])
            block.add(
                f"{head}{{ T sum = T(0);\n#pragma omp simd reduction(+ : sum)\n{block.indent}"
                f"for (int k = 0; k < {full[-1]}; ++k) sum += {item};"
                f" {name}[{flat(index, shape)}] = sum; }}{tail}"
            )
            return array_ref(name, shape)
        index, head, tail = loops(full)
        padded = shape + (1,) * (len(full) - len(shape))
        name = self.fresh("a")
        size = max(prod(shape), 1)
        block.add(f"T {name}[{size}]; for (int j = 0; j < {size}; ++j) {name}[j] = T(0);")
        where = flat(broadcast(index, padded), padded)
        block.add(f"{head}{name}[{where}] += {ref.at(index)};{tail}")
        return array_ref(name, shape)

    def product(self, op: Op, x: Ref, w: Ref, block: Block) -> Ref:
        """A row times a weight, head by head."""
        batch, width = x.shape[:-1], x.shape[-1]
        name, size = self.fresh("a"), max(op.type.numel, 1)
        out = op.type.shape[len(batch) :]
        b, head, tail = loops(batch)
        o, out_head, out_tail = loops(out, "o")
        where = flat([*b, *o], op.type.shape)
        block.add(f"T {name}[{size}];")
        block.add(
            f"{head}{out_head}{{ T sum = T(0);\n#pragma omp simd reduction(+ : sum)\n{block.indent}"
            f"for (int k = 0; k < {width}; ++k) sum += {x.at([*b, 'k'])} * {w.at([*b, 'k', *o])};"
            f" {name}[{where}] = sum; }}{out_tail}{tail}"
        )
        return array_ref(name, op.type.shape)

    def transposed_product(self, op: Op, y: Ref, w: Ref, block: Block) -> Ref:
        """A row times a transposed weight, head by head."""
        batch = int(op.attrs[0])  # type: ignore[arg-type]
        out = y.shape[batch:]
        if prod(out) == 1:
            zeros = ["0"] * len(out)

            def at(index: list[str]) -> str:
                return f"({y.at([*index[:batch], *zeros])} * {w.at([*index, *zeros])})"

            return self._keep(op, Ref(op.type.shape, at, lazy=True), block)
        index, head, tail = loops(op.type.shape)
        o, out_head, out_tail = loops(out, "o")
        name = self.fresh("a")
        term = f"{y.at([*index[:batch], *o])} * {w.at([*index, *o])}"
        block.add(
            f"T {name}[{op.type.numel}]; {head}{{ T sum = T(0); {out_head}sum += {term};{out_tail}"
            f" {name}[{flat(index, op.type.shape)}] = sum; }}{tail}"
        )
        return array_ref(name, op.type.shape)


_At = Callable[[list[str]], str]


def _expand(op: Op, refs: list[Ref], values: Values, block: Block) -> _At:
    (x,) = refs
    x = values.narrow(x, op.type.shape, block)
    return lambda index: x.at(broadcast(index, x.shape))


def _reshape(op: Op, refs: list[Ref], values: Values, block: Block) -> _At:
    array = refs[0] if refs[0].array else values.to_array(refs[0], block)
    return lambda index: f"{array.array}[{flat(index, op.type.shape)}]"


def _slice(op: Op, refs: list[Ref], values: Values, block: Block) -> _At:
    (x,) = refs
    return lambda index: x.at([*index[:-1], f"({index[-1]} + {op.attrs[0]})"])


def _embed(op: Op, refs: list[Ref], values: Values, block: Block) -> _At:
    (x,) = refs
    start, width = int(op.attrs[0]), x.shape[-1]  # type: ignore[arg-type]

    def at(index: list[str]) -> str:
        k = f"({index[-1]} - {start})"
        inside = f"{index[-1]} >= {start} && {index[-1]} < {start + width}"
        return f"({inside} ? {x.at([*index[:-1], k])} : T(0))"

    return at


def _concat(op: Op, refs: list[Ref], values: Values, block: Block) -> _At:
    return lambda index: _nest(refs, index)


def _nest(refs: list[Ref], index: list[str]) -> str:
    text, tail, start = "", "", 0
    for position, ref in enumerate(refs):
        part = ref.at([*index[:-1], f"({index[-1]} - {start})"])
        start += ref.shape[-1]
        if position == len(refs) - 1:
            text += part
        else:
            text += f"({index[-1]} < {start} ? {part} : "
            tail += ")"
    return text + tail


_RESHAPERS: dict[str, Callable[[Op, list[Ref], Values, Block], _At]] = {
    "expand": _expand,
    "reshape": _reshape,
    "slice": _slice,
    "embed": _embed,
    "concat": _concat,
}
