"""Symbols: what the arguments and values of a layer function are while it is traced.

A symbol knows its row domain once it has one; arithmetic brings operands to one domain and appends
to the inter-operator IR. What symbols cannot do (comparisons, subscripts, attributes, functions of
torch) is refused with the line of the layer's source.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Attr, Type
from dataeff.rgnn.tracer import LayerTypeError, Tracer, user_line

LARGEST_POWER = 16
# What to write in place of functions of torch.
_SAME = ("exp", "gelu", "leaky_relu", "log", "outer", "relu", "reshape", "sigmoid", "split")
_INSTEAD = {name: f"rgnn.{name}" for name in (*_SAME, "sqrt", "tanh")} | {
    "cat": "rgnn.concat",
    "concat": "rgnn.concat",
    "matmul": "rgnn.linear",
    "softmax": "rgnn.edge_softmax",
    "view": "rgnn.reshape",
}


class Symbol:
    """Arithmetic shared by everything a layer function can hold."""

    tracer: Tracer

    def __add__(self, other: Any) -> Value:
        return binary("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return binary("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return binary("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return binary("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return binary("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return binary("mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return binary("div", other, self)

    def __neg__(self) -> Value:
        return unary("neg", self)

    def __pow__(self, exponent: Any) -> Value:
        return _power(self, exponent)

    def __bool__(self) -> bool:
        raise self.tracer.error(
            f"{self!r} is computed for every row when the layer runs, and has no truth while it is"
            " traced: use rgnn.positive(x) as a factor, or decide by a constant argument"
        )

    __hash__ = object.__hash__
    __array_ufunc__ = None  # numpy leaves arithmetic with its arrays to the methods here

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or name in ("tracer", "id", "name"):  # or not a symbol yet
            raise AttributeError(name)
        instead = _INSTEAD.get(name, "the functions of rgnn and arithmetic")
        raise self.tracer.error(f"{self!r} has no attribute {name!r}: use {instead}")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        instead = _INSTEAD.get(name, "the functions of rgnn and arithmetic")
        raise LayerTypeError(
            f"{user_line()}\n  torch's {name} takes tensors, not the symbols of a layer:"
            f" use {instead}"
        )


class Value(Symbol):
    """A computed value: one row per element of its domain."""

    def __init__(self, tracer: Tracer, op_id: int) -> None:
        self.tracer = tracer
        self.id = op_id

    @property
    def type(self) -> Type:
        """Row domain and row shape."""
        return self.tracer.builder[self.id].type

    def __repr__(self) -> str:
        return f"a value of type {self.type}"


class Argument(Symbol):
    """A tensor argument; its domain follows from how the layer first uses it."""

    def __init__(self, tracer: Tracer, name: str) -> None:
        self.tracer = tracer
        self.name = name

    def __getitem__(self, key: Any) -> Picked:
        if not isinstance(key, TypeKey):
            raise self.tracer.error(
                f"argument {self.name} can be indexed with g.etype or g.ntype, not with {key!r}"
            )
        return Picked(self.tracer, self.at(key.domain))

    def at(self, domain: str) -> int:
        """The input operation of this argument in a domain."""
        return self.tracer.resolve(self.name, domain)

    @property
    def is_parameter(self) -> bool:
        """Whether it is the same for every row."""
        return self.tracer.domains.get(self.name) == "one"

    def rows(self, role: str) -> str:
        """`node` or `dst`: what this argument's row count makes it, read as `role`."""
        return self.tracer.node_domain(self.name, role)

    def __repr__(self) -> str:
        return f"argument {self.name}"


class TypeKey:
    """`g.etype` or `g.ntype`: picks from arguments of the layer, and does nothing else."""

    def __init__(self, tracer: Tracer, domain: str) -> None:
        self.tracer = tracer
        self.domain = domain

    def __repr__(self) -> str:
        return f"g.{self.domain}"

    def _not_there(self, *_: Any, **__: Any) -> NoReturn:
        raise self.tracer.error(
            f"{self!r} picks from arguments of the layer, as in W[{self!r}], and nothing else does"
            " with it: what the function holds for each type is passed as an argument, a tensor"
        )

    # What tensors, arrays, lists and dictionaries ask of an index, and numbers of what they meet.
    __len__ = __array__ = __index__ = __hash__ = __getitem__ = _not_there
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _not_there


class Picked(Symbol):
    """A typed parameter, `W[g.etype]`: each row picks the entry of its own type."""

    def __init__(self, tracer: Tracer, op_id: int) -> None:
        self.tracer = tracer
        self.id = op_id

    @property
    def type(self) -> Type:
        """Type domain, and the shape of one type's entry."""
        return self.tracer.builder[self.id].type

    def __repr__(self) -> str:
        return f"a parameter of type {self.tracer.builder[self.id].type}"


def _refused(what: str, remedy: str) -> Callable[..., NoReturn]:
    def method(self: Symbol, *operands: Any) -> NoReturn:
        others = "".join(f" and {other!r}" for other in operands)
        raise self.tracer.error(f"{self!r}{others}: a layer function cannot {what}; {remedy}")

    return method


_METHODS = {
    "compare symbols": (
        "rgnn.positive(a - b) is 1 where a is greater",
        ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"),
    ),
    "take parts of a symbol by numbers": (
        "rgnn.split cuts the last axis",
        ("__getitem__", "__iter__", "__len__"),
    ),
    "change a symbol in place": (
        "write what it becomes as a new value",
        ("__setitem__", "__delitem__"),
    ),
    "multiply symbols by @": ("use rgnn.linear or rgnn.dot", ("__matmul__", "__rmatmul__")),
    "make a number of a symbol": (
        "give numbers as constant arguments",
        ("__float__", "__int__", "__index__"),
    ),
    "use this operator": (
        "there are + - * / and **, and the functions of rgnn",
        ("__abs__", "__rpow__", "__mod__", "__rmod__", "__floordiv__", "__rfloordiv__"),
    ),
}
for _what, (_remedy, _names) in _METHODS.items():
    for _name in _names:
        setattr(Symbol, _name, _refused(_what, _remedy))


def tracer_of(*symbols: Any) -> Tracer:
    """The tracer of the first symbol among the operands of a function."""
    for s in symbols:
        if isinstance(s, Symbol):
            return s.tracer
    given = ", ".join(map(described, symbols)) or "none"
    raise LayerTypeError(
        f"{user_line()}\n  expected values of a layer that is being traced, got {given}"
    )


def emit(tracer: Tracer, kind: str, *args: int, attrs: Sequence[Attr] = ()) -> Value:
    """Append an operation and return its value."""
    return Value(tracer, tracer.emit(kind, *args, attrs=attrs))


def as_rows(tracer: Tracer, symbol: Any) -> Value:
    """A value; an argument not used otherwise is a node value."""
    if isinstance(symbol, Value):
        return symbol
    if isinstance(symbol, Argument):
        known = tracer.known(symbol.name)
        return Value(tracer, symbol.at("node") if known is None else known)
    if isinstance(symbol, Picked):
        return Value(tracer, symbol.id)
    raise tracer.error(f"expected a value, got {described(symbol)}")


def described(other: Any) -> str:
    """What a message calls something that is no symbol."""
    shape = getattr(other, "shape", None)
    if shape is None:
        return f"{other!r} of type {type(other).__name__}"
    kind = type(other).__name__
    return f"a {kind} of shape {list(shape)} that is not an argument; pass it to the layer"


def unary(kind: str, x: Any, attrs: Sequence[Attr] = ()) -> Value:
    """An elementwise function of one operand."""
    tracer = tracer_of(x)
    return emit(tracer, kind, as_rows(tracer, x).id, attrs=attrs)


def binary(kind: str, a: Any, b: Any) -> Value:
    """An elementwise function of two operands in one domain."""
    tracer = tracer_of(a, b)
    left, right = align(tracer, [a, b])
    _refuse_table(tracer, (a, left), (b, right))
    _refuse_table(tracer, (b, right), (a, left))
    return emit(tracer, kind, left.id, right.id)


def _refuse_table(tracer: Tracer, given: tuple[Any, Value], other: tuple[Any, Value]) -> None:
    """Numbers of rows do not meet whole parameters: `x / g.in_degree()` would be x for every row.

    Numbers of relations do, as coefficients of bases.
    """
    argument, table = given
    number = other[1].type
    rows = isinstance(other[0], Value) and number.domain not in ("one", *domains.TYPE_DOMAINS)
    if isinstance(argument, Argument) and argument.is_parameter and rows and not number.shape:
        if len(table.type.shape) < 2:
            return
        raise tracer.error(
            f"{argument!r}, {list(table.type.shape)}, stands on its own, as a parameter that is the"
            f" same for every row, and would be repeated for each row of {number}: g.at_dst or"
            " g.src reads a row of it each, and rgnn.reshape(a, 1, 1) of the other repeats it"
        )


def _power(base: Symbol, exponent: Any) -> Value:
    """Integer powers by products, square roots, and one over them."""
    tracer = base.tracer
    value: Value = as_rows(tracer, base)
    size = abs(exponent) if isinstance(exponent, int | float) else 0
    if size == 0.5:
        power = unary("sqrt", value)
    elif size in range(1, LARGEST_POWER + 1):
        power = value
        for _ in range(int(size) - 1):
            power = power * value
    else:
        raise tracer.error(
            f"cannot raise {value.type} to {exponent!r}: powers are 0.5, 1 to {LARGEST_POWER} and"
            " their negatives; rgnn.exp(rgnn.log(x) * p) is any other one of positive x"
        )
    return power if exponent > 0 else 1 / power


def align(tracer: Tracer, symbols: Sequence[Any]) -> list[Value]:
    """Bring operands to one row domain: that of the operand with rows of its own."""
    plain: list[Value | Picked] = [
        s if isinstance(s, Picked) else _operand(tracer, s) for s in symbols
    ]
    found = [v.type.domain for v in plain if isinstance(v, Value) and v.type.domain != "one"]
    if not found:
        if any(isinstance(v, Picked) for v in plain):
            typed = [v.type.domain for v in plain]
            found = [d for d in typed if d != "one"]
        else:
            found = ["one"]
    rows = [d for d in found if d not in domains.TYPE_DOMAINS]  # types follow rows, not they types
    domain = "dst" if set(rows) == {"node", "dst"} else (rows or found)[0]
    other = next((v.type for v in plain if v.type.domain == domain), None)
    return [bring(tracer, v, domain, other) for v in plain]


def _operand(tracer: Tracer, symbol: Any) -> Value:
    if isinstance(symbol, Value):
        return symbol
    if isinstance(symbol, Argument):
        known = tracer.known(symbol.name)
        return Value(tracer, symbol.at("one") if known is None else known)
    if not isinstance(symbol, bool) and isinstance(symbol, numbers.Real):
        if not math.isfinite(symbol):
            raise tracer.error(f"cannot compute with {symbol!r}: constants are finite")
        return Value(tracer, tracer.const(float(symbol)))
    raise tracer.error(f"cannot compute with {described(symbol)}")


def bring(tracer: Tracer, value: Value | Picked, domain: str, other: Type | None = None) -> Value:
    """A value at the rows of a domain that its own is known from; `other` stands there already."""
    have = tracer.builder[value.id].type.domain
    if have == domain:
        return Value(tracer, value.id)
    if have == "node" and domain == "dst":
        return first_rows(tracer, value)
    if have in domains.TYPE_DOMAINS and domains.path(domain, have):
        return emit(tracer, "gather", value.id, attrs=(f"{domain}.{have}",))
    there = domains.a_value(domain) if other is None else f"{other}, {domains.a_value(domain)}"
    raise tracer.error(
        f"{tracer.builder[value.id].type} is {domains.a_value(have)}, and is used with {there};"
        " bring it there with g.src, g.dst or g.edge, or reduce with g.sum"
    )


def first_rows(tracer: Tracer, value: Value | Picked) -> Value:
    """A value of the source nodes at the destinations, which are the first of them."""
    sources, destinations = tracer.rows.node, tracer.rows.dst
    if sources < destinations:
        raise tracer.error(
            f"{tracer.builder[value.id].type} is {domains.a_value('node')}, and is used with"
            f" {domains.a_value('dst')}; the {destinations} destination nodes of this graph are"
            f" not among its {sources} source nodes: give them an argument of their own rows"
        )
    return emit(tracer, "prefix", value.id)


def expect(tracer: Tracer, symbol: Any, wanted: tuple[str, ...], what: str) -> Value:
    """A value of one of these domains; `what` needs it."""
    value = as_rows(tracer, symbol)
    if value.type.domain not in wanted:
        raise tracer.error(f"{what} needs {domains.a_value(*wanted)}, got {value.type}")
    return value
