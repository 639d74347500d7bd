"""Reverse-mode differentiation of an inter-operator program.

The result is a *joint* program: the forward operations, then the adjoints, in one list. A gather's
adjoint is a sum along the same map and the other way round, so backward needs no new row domains;
the maximum and the logarithm of the sum that `edge_softmax` computes serve both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from dataeff.rgnn.ir import Builder, Op, Program, Type
from dataeff.rgnn.signatures import NO_DERIVATIVE


def gradient_input(position: int) -> str:
    """Name of the input that carries the gradient of output `position`."""
    return f"grad:{position}"


def differentiate(program: Program, wanted: Collection[str]) -> Program:
    """Append the adjoints of `program`.

    Args:
        program: a forward program.
        wanted: names of the inputs whose gradients are returned.

    Returns:
        A program that returns the outputs of `program`, then the gradients of the wanted inputs in
        the order of the inputs. It has one more input per output, `gradient_input(k)`.

    Raises:
        ValueError: a wanted input does not exist.
        NotImplementedError: the program holds an operation of a backward program.
    """
    names = [str(op.attrs[0]) for op in program.inputs]
    unknown = set(wanted) - set(names)
    if unknown:
        raise ValueError(f"the program has no input {sorted(unknown)}; it has {names}")
    return _Reverse(program, wanted).run()


class _Reverse:
    """One differentiation: the growing joint program, and the adjoint of each forward value."""

    def __init__(self, program: Program, wanted: Collection[str]) -> None:
        self.forward = program
        self.wanted = wanted
        self.builder = Builder()
        for op in program.ops:
            self.builder.copy(op, op.args)
        self.adjoint: dict[int, int] = {}
        self.active = self._active()
        self.line = ""

    def _active(self) -> set[int]:
        """Values that depend on a wanted input."""
        found: set[int] = set()
        for op in self.forward.ops:
            if op.kind == "input":
                if op.attrs[0] in self.wanted:
                    found.add(op.id)
            elif op.kind not in NO_DERIVATIVE and any(a in found for a in op.args):
                found.add(op.id)
        return found

    def run(self) -> Program:
        for position, output in enumerate(self.forward.outputs):
            kind = self.forward[output].type
            seed = self.builder.emit("input", attrs=(gradient_input(position),), type=kind)
            self.add(output, seed)
        for op in reversed(self.forward.ops):
            if op.id in self.active and op.id in self.adjoint and op.kind != "input":
                self.line = op.line
                rule = _RULES.get(op.kind)
                if rule is None:
                    raise NotImplementedError(f"{op.kind} has no derivative (double backward?)")
                rule(self, op, self.adjoint[op.id])
        gradients = [
            self.adjoint.get(op.id) for op in self.forward.inputs if op.attrs[0] in self.wanted
        ]
        inputs = [op for op in self.forward.inputs if op.attrs[0] in self.wanted]
        filled = [
            self.zero(op.type) if g is None else g for op, g in zip(inputs, gradients, strict=True)
        ]
        return self.builder.program((*self.forward.outputs, *filled))

    def emit(self, kind: str, *args: int, attrs: tuple[object, ...] = ()) -> int:
        return self.builder.emit(kind, *args, attrs=attrs, line=self.line)  # type: ignore[arg-type]

    def type(self, value: int) -> Type:
        return self.builder[value].type

    def zero(self, kind: Type) -> int:
        value = self.builder.emit("const", attrs=(0.0,), type=Type("one"))
        if kind.domain != "one":
            value = self.emit("gather", value, attrs=(f"{kind.domain}.one",))
        return self.emit("expand", value, attrs=(kind.shape,)) if kind.shape else value

    def const(self, number: float, like: int) -> int:
        value = self.builder.emit("const", attrs=(number,), type=Type("one"))
        domain = self.type(like).domain
        if domain == "one":
            return value
        return self.emit("gather", value, attrs=(f"{domain}.one",))

    def add(self, value: int, contribution: int) -> None:
        """Accumulate into the adjoint of `value`, undoing a broadcast."""
        if value not in self.active:
            return
        shape = self.type(value).shape
        if self.type(contribution).shape != shape:
            contribution = self.emit("reduce", contribution, attrs=(shape,))
        have = self.adjoint.get(value)
        self.adjoint[value] = contribution if have is None else self.emit("add", have, contribution)

    def needs(self, value: int) -> bool:
        return value in self.active


_Rule = Callable[[_Reverse, Op, int], None]


def _gather(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("sum", dy, attrs=op.attrs))


def _sum(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("gather", dy, attrs=op.attrs))


def _max(r: _Reverse, op: Op, dy: int) -> None:
    """Equal maxima share the gradient equally."""
    (x,) = op.args
    chosen = r.emit("equal", x, r.emit("gather", op.id, attrs=op.attrs))
    count = r.emit("sum", chosen, attrs=op.attrs)
    share = r.emit("div", dy, r.emit("maximum", count, r.const(1.0, count)))
    r.add(x, r.emit("mul", chosen, r.emit("gather", share, attrs=op.attrs)))


def _logsum(r: _Reverse, op: Op, dy: int) -> None:
    """Relative to `top`, which is a constant, it has the derivative of the whole logsumexp."""
    (x,) = op.args
    shifted = x
    for part in (r.emit("top", x, attrs=op.attrs), op.id):
        shifted = r.emit("sub", shifted, r.emit("gather", part, attrs=op.attrs))
    weight = r.emit("exp", shifted)
    r.add(x, r.emit("mul", weight, r.emit("gather", dy, attrs=op.attrs)))


def _prefix(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("pad", dy))


def _pad(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("prefix", dy))


def _linear(r: _Reverse, op: Op, dy: int) -> None:
    x, w = op.args
    if r.needs(x):
        r.add(x, r.emit("linear_t", dy, w, attrs=(len(r.type(x).shape) - 1,)))
    if r.needs(w):
        r.add(w, r.emit("outer", x, dy, attrs=(r.type(w).domain,)))


def _einsum(r: _Reverse, op: Op, dy: int) -> None:
    a, b = op.args
    inputs, out = str(op.attrs[0]).split("->")
    left, right = inputs.split(",")
    if r.needs(a):
        r.add(a, r.emit("einsum", dy, b, attrs=(f"{out},{right}->{left}",)))
    if r.needs(b):
        r.add(b, r.emit("einsum", dy, a, attrs=(f"{out},{left}->{right}",)))


def _reduce(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("expand", dy, attrs=(r.type(op.args[0]).shape,)))


def _expand(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], dy)


def _reshape(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("reshape", dy, attrs=(r.type(op.args[0]).shape,)))


def _concat(r: _Reverse, op: Op, dy: int) -> None:
    start = 0
    for arg in op.args:
        stop = start + r.type(arg).shape[-1]
        r.add(arg, r.emit("slice", dy, attrs=(start, stop)))
        start = stop


def _slice(r: _Reverse, op: Op, dy: int) -> None:
    total = r.type(op.args[0]).shape[-1]
    r.add(op.args[0], r.emit("embed", dy, attrs=(op.attrs[0], total)))


def _add(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], dy)
    r.add(op.args[1], dy)


def _sub(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], dy)
    if r.needs(op.args[1]):
        r.add(op.args[1], r.emit("neg", dy))


def _mul(r: _Reverse, op: Op, dy: int) -> None:
    a, b = op.args
    if r.needs(a):
        r.add(a, r.emit("mul", dy, b))
    if r.needs(b):
        r.add(b, r.emit("mul", dy, a))


def _div(r: _Reverse, op: Op, dy: int) -> None:
    a, b = op.args
    if r.needs(a):
        r.add(a, r.emit("div", dy, b))
    if r.needs(b):
        r.add(b, r.emit("neg", r.emit("div", r.emit("mul", dy, op.id), b)))


def _neg(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("neg", dy))


def _exp(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("mul", op.id, dy))


def _log(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("div", dy, op.args[0]))


def _sqrt(r: _Reverse, op: Op, dy: int) -> None:
    half = r.emit("mul", dy, r.const(0.5, dy))
    r.add(op.args[0], r.emit("div", half, op.id))


def _tanh(r: _Reverse, op: Op, dy: int) -> None:
    square = r.emit("mul", op.id, op.id)
    r.add(op.args[0], r.emit("mul", dy, r.emit("sub", r.const(1.0, dy), square)))


def _sigmoid(r: _Reverse, op: Op, dy: int) -> None:
    rest = r.emit("sub", r.const(1.0, dy), op.id)
    r.add(op.args[0], r.emit("mul", dy, r.emit("mul", op.id, rest)))


def _leaky_relu(r: _Reverse, op: Op, dy: int) -> None:
    slope = op.attrs[0] if op.attrs else 0.0
    r.add(op.args[0], r.emit("mul", dy, r.emit("slope", op.args[0], attrs=(slope,))))


def _gelu(r: _Reverse, op: Op, dy: int) -> None:
    r.add(op.args[0], r.emit("mul", dy, r.emit("gelu_grad", op.args[0])))


_RULES: dict[str, _Rule] = {
    "gather": _gather,
    "sum": _sum,
    "max": _max,
    "logsum": _logsum,
    "prefix": _prefix,
    "pad": _pad,
    "linear": _linear,
    "einsum": _einsum,
    "reduce": _reduce,
    "expand": _expand,
    "reshape": _reshape,
    "concat": _concat,
    "slice": _slice,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "exp": _exp,
    "log": _log,
    "sqrt": _sqrt,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "relu": _leaky_relu,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
}
