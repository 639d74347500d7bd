"""The layer language: what a layer function computes with while it is traced.

Inside a function decorated with `rgnn.layer`, tensors are symbols and every operation here appends
to the inter-operator IR. A value knows its row domain; mixing domains or shapes that do not fit
raises `LayerTypeError` with the line of the layer's source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Attr, Type
from dataeff.rgnn.tracer import LayerTypeError, Tracer, user_line

LARGEST_POWER = 16


class Symbol:
    """Arithmetic shared by everything a layer function can hold."""

    tracer: Tracer

    def __add__(self, other: Any) -> Value:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return _binary("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return _binary("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return _binary("mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return _binary("div", other, self)

    def __neg__(self) -> Value:
        return _unary("neg", self)

    def __pow__(self, exponent: Any) -> Value:
        return _power(self, exponent)

    def __bool__(self) -> bool:
        raise self.tracer.error(
            f"{self!r} is computed for every row when the layer runs, and has no truth while it is"
            " traced: use rgnn.positive(x) as a factor, or decide by a constant argument"
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        instead = f"rgnn.{name}" if name in globals() else "the functions of rgnn and arithmetic"
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

    def rows(self, role: str) -> str:
        """`node` or `dst`: what this argument's row count makes it, read as `role`."""
        return self.tracer.node_domain(self.name, role)

    def __repr__(self) -> str:
        return f"argument {self.name}"


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


class TypeKey:
    """`g.etype` or `g.ntype`."""

    def __init__(self, domain: str) -> None:
        self.domain = domain

    def __repr__(self) -> str:
        return f"g.{self.domain}"


class PerRelation:
    """`g.per_relation`: reductions of edge values to (destination, relation) pairs."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer

    def sum(self, value: Symbol) -> Value:
        """Sum over the edges of each pair."""
        return _reduce_along("sum", "edge.dst_pair", value)

    def max(self, value: Symbol) -> Value:
        """Maximum over the edges of each pair."""
        return _reduce_along("max", "edge.dst_pair", value)

    def mean(self, value: Symbol) -> Value:
        """Mean over the edges of each pair."""
        return _mean_along("edge.dst_pair", value)


class GraphSymbol:
    """The graph inside a layer function: where values are read from, and reduced to."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.etype = TypeKey("etype")
        self.ntype = TypeKey("ntype")
        self.per_relation = PerRelation(tracer)

    def node(self, value: Symbol) -> Value:
        """An argument as a value of the source nodes."""
        if isinstance(value, Argument):
            return Value(self.tracer, value.at("node"))
        found = _expect(self.tracer, value, ("node",), "g.node")
        return found

    def src(self, value: Symbol) -> Value:
        """Bring a node value to the edges that leave the node."""
        node = self.node(value)
        return _emit(self.tracer, "gather", node.id, attrs=("edge.src",))

    def dst(self, value: Symbol) -> Value:
        """Bring a node value to the edges that enter the node."""
        found = _at_dst(self.tracer, value)
        return _emit(self.tracer, "gather", found.id, attrs=("edge.dst",))

    def at_dst(self, value: Symbol) -> Value:
        """A node value at the destination nodes (of a block: its first rows)."""
        return _at_dst(self.tracer, value)

    def edge(self, value: Symbol) -> Value:
        """A value per edge, given in the order of `edge_index`."""
        if isinstance(value, Argument):
            return _emit(self.tracer, "gather", value.at("given"), attrs=("edge.given",))
        return _expect(self.tracer, value, ("edge",), "g.edge")

    def sum(self, value: Symbol) -> Value:
        """Sum an edge (or per-relation) value over each destination's edges (or relations)."""
        return _reduce_along("sum", _to_dst(self.tracer, value, "g.sum"), value)

    def max(self, value: Symbol) -> Value:
        """Maximum over each destination's edges; 0 where there are none."""
        return _reduce_along("max", _to_dst(self.tracer, value, "g.max"), value)

    def mean(self, value: Symbol) -> Value:
        """Mean over each destination's edges; 0 where there are none."""
        return _mean_along(_to_dst(self.tracer, value, "g.mean"), value)

    def mean_per_relation(self, value: Symbol) -> Value:
        """Mean over each destination's edges of each relation, summed over relations."""
        return self.sum(self.per_relation.mean(value))

    def in_degree(self) -> Value:
        """Number of edges that enter each destination."""
        return _emit(self.tracer, "degree", attrs=("edge.dst",))

    def out_degree(self) -> Value:
        """Number of edges that leave each source node."""
        return _emit(self.tracer, "degree", attrs=("edge.src",))

    def degree_norm(self) -> Value:
        """1 / sqrt(out-degree of the source x in-degree of the destination), for each edge."""
        product = self.src(self.out_degree()) * self.dst(self.in_degree())
        return 1.0 / sqrt(product)

    def to_given_order(self, value: Symbol) -> Value:
        """An edge value in the order of `edge_index`, to be returned by the layer."""
        found = _expect(self.tracer, value, ("edge",), "g.to_given_order")
        return _emit(self.tracer, "sum", found.id, attrs=("edge.given",))


def linear(x: Symbol, weight: Symbol) -> Value:
    """Row times matrix: `y[..., o] = sum_i x[..., i] W[..., i, o]`.

    Args:
        x: rows [*batch, in].
        weight: a parameter [*batch, in, *out], or a typed one, `W[g.etype]` or `W[g.ntype]`.

    Returns:
        Rows [*batch, *out]. Leading axes that x has before `in` are shared with the weight, so a
        weight [heads, d, d] is applied head by head to x of [heads, d].
    """
    tracer = _tracer(x, weight)
    left = _as_rows(tracer, x)
    right = weight.id if isinstance(weight, Picked | Value) else _parameter(tracer, weight)
    return _emit(tracer, "linear", left.id, right)


def dot(a: Symbol, b: Symbol) -> Value:
    """Inner product over the last axis of two values of one shape."""
    tracer = _tracer(a, b)
    left, right = _align(tracer, [a, b])
    product = _emit(tracer, "mul", left.id, right.id)
    if not product.type.shape:
        raise tracer.error(f"dot needs an axis to sum over, got {left.type} and {right.type}")
    return _emit(tracer, "reduce", product.id, attrs=(product.type.shape[:-1],))


def outer(a: Symbol, b: Symbol) -> Value:
    """Outer product of rows: `y[i, j] = a[i] b[j]`, for values of one row domain."""
    tracer = _tracer(a, b)
    left, right = _align(tracer, [a, b])
    if len(left.type.shape) != 1 or len(right.type.shape) != 1:
        raise tracer.error(f"outer needs rows with one axis, got {left.type} and {right.type}")
    return reshape(left, left.type.numel, 1) * reshape(right, 1, right.type.numel)


def concat(*values: Symbol) -> Value:
    """Join values along their last axis."""
    tracer = _tracer(*values)
    return _emit(tracer, "concat", *(v.id for v in _align(tracer, values)))


def split(value: Symbol, sizes: Sequence[int]) -> tuple[Value, ...]:
    """Cut a value into parts of these sizes along its last axis."""
    tracer = _tracer(value)
    whole = _as_rows(tracer, value)
    if isinstance(sizes, int):
        raise tracer.error(f"split needs the size of each part, as in [2, 3], not {sizes}")
    if not whole.type.shape or sum(sizes) != whole.type.shape[-1]:
        raise tracer.error(f"sizes {list(sizes)} do not add up to the last axis of {whole.type}")
    parts, start = [], 0
    for size in sizes:
        parts.append(_emit(tracer, "slice", whole.id, attrs=(start, start + size)))
        start += size
    return tuple(parts)


def reshape(value: Symbol, *shape: int) -> Value:
    """Give each row another shape, for example `reshape(q, heads, -1)`."""
    tracer = _tracer(value)
    rows = _as_rows(tracer, value)
    if -1 in shape:
        rest = 1
        for size in shape:
            rest *= size if size != -1 else 1
        shape = tuple(rows.type.numel // max(rest, 1) if s == -1 else s for s in shape)
    return _emit(tracer, "reshape", rows.id, attrs=(shape,))


def exp(x: Symbol) -> Value:
    """Exponential."""
    return _unary("exp", x)


def log(x: Symbol) -> Value:
    """Natural logarithm."""
    return _unary("log", x)


def sqrt(x: Symbol) -> Value:
    """Square root."""
    return _unary("sqrt", x)


def tanh(x: Symbol) -> Value:
    """Hyperbolic tangent."""
    return _unary("tanh", x)


def sigmoid(x: Symbol) -> Value:
    """Logistic function."""
    return _unary("sigmoid", x)


def relu(x: Symbol) -> Value:
    """max(x, 0)."""
    return _unary("relu", x)


def gelu(x: Symbol) -> Value:
    """The Gaussian error linear unit, x Phi(x)."""
    return _unary("gelu", x)


def leaky_relu(x: Symbol, negative_slope: float = 0.01) -> Value:
    """X where positive, else x times the slope."""
    return _unary("leaky_relu", x, (float(negative_slope),))


def positive(x: Symbol) -> Value:
    """1 where positive, else 0; its derivative is taken as zero."""
    return _unary("slope", x, (0.0,))


def edge_softmax(score: Symbol, *, per_relation: bool = False) -> Value:
    """Softmax of an edge value over the edges of each destination (and relation).

    The largest score of a segment is subtracted before `exp`, so scores of any size are safe. The
    logarithm of the sum is what backward keeps (Milakov and Gimelshein, arXiv 1805.02867).
    """
    tracer = _tracer(score)
    edges = _expect(tracer, score, ("edge",), "edge_softmax")
    name = "edge.dst_pair" if per_relation else "edge.dst"
    total = _emit(tracer, "logsumexp", edges.id, attrs=(name,))
    back = _emit(tracer, "gather", total.id, attrs=(name,))
    return _unary("exp", _emit(tracer, "sub", edges.id, back.id))


def _tracer(*symbols: Any) -> Tracer:
    for s in symbols:
        if isinstance(s, Symbol):
            return s.tracer
    raise LayerTypeError(f"expected values of a layer that is being traced, got {symbols!r}")


def _parameter(tracer: Tracer, symbol: Any) -> int:
    if not isinstance(symbol, Argument):
        raise tracer.error(f"expected a parameter, got {symbol!r}")
    return symbol.at("one")


def _emit(tracer: Tracer, kind: str, *args: int, attrs: Sequence[Attr] = ()) -> Value:
    return Value(tracer, tracer.emit(kind, *args, attrs=attrs))


def _as_rows(tracer: Tracer, symbol: Any) -> Value:
    """A value; an argument not used otherwise is a node value."""
    if isinstance(symbol, Value):
        return symbol
    if isinstance(symbol, Argument):
        known = tracer.known(symbol.name)
        return Value(tracer, symbol.at("node") if known is None else known)
    if isinstance(symbol, Picked):
        return Value(tracer, symbol.id)
    raise tracer.error(f"expected a value, got {symbol!r}")


def _unary(kind: str, x: Any, attrs: Sequence[Attr] = ()) -> Value:
    tracer = _tracer(x)
    return _emit(tracer, kind, _as_rows(tracer, x).id, attrs=attrs)


def _binary(kind: str, a: Any, b: Any) -> Value:
    tracer = _tracer(a, b)
    left, right = _align(tracer, [a, b])
    return _emit(tracer, kind, left.id, right.id)


def _power(base: Symbol, exponent: Any) -> Value:
    """Integer powers by products, square roots, and one over them."""
    tracer = base.tracer
    value = _as_rows(tracer, base)
    size = abs(exponent) if isinstance(exponent, int | float) else 0
    if size == 0.5:
        power = sqrt(value)
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


def _align(tracer: Tracer, symbols: Sequence[Any]) -> list[Value]:
    """Bring operands to one row domain: that of the operand with rows of its own."""
    plain = [s if isinstance(s, Picked) else _operand(tracer, s) for s in symbols]
    found = [v.type.domain for v in plain if isinstance(v, Value) and v.type.domain != "one"]
    if not found:
        if any(isinstance(v, Picked) for v in plain):
            typed = [tracer.builder[v.id].type.domain for v in plain if v is not None]
            found = [d for d in typed if d != "one"]
        else:
            found = ["one"]
    rows = [d for d in found if d not in domains.TYPE_DOMAINS]  # types follow rows, not they types
    domain = "dst" if set(rows) == {"node", "dst"} else (rows or found)[0]
    return [_bring(tracer, v, domain) for v in plain]


def _operand(tracer: Tracer, symbol: Any) -> Value:
    if isinstance(symbol, Value):
        return symbol
    if isinstance(symbol, Argument):
        known = tracer.known(symbol.name)
        return Value(tracer, symbol.at("one") if known is None else known)
    if isinstance(symbol, int | float) and not isinstance(symbol, bool):
        return Value(tracer, tracer.const(float(symbol)))
    raise tracer.error(f"cannot compute with {symbol!r} of type {type(symbol).__name__}")


def _bring(tracer: Tracer, value: Value | Picked, domain: str) -> Value:
    have = tracer.builder[value.id].type.domain
    if have == domain:
        return Value(tracer, value.id)
    if have == "node" and domain == "dst":
        return _emit(tracer, "prefix", value.id)
    if have in domains.TYPE_DOMAINS and domains.path(domain, have):
        return _emit(tracer, "gather", value.id, attrs=(f"{domain}.{have}",))
    raise tracer.error(
        f"{tracer.builder[value.id].type} is {domains.a_value(have)}, and is used with"
        f" {domains.a_value(domain)}; bring it there with g.src, g.dst or g.edge, or reduce with"
        " g.sum"
    )


def _expect(tracer: Tracer, symbol: Any, wanted: tuple[str, ...], what: str) -> Value:
    value = _as_rows(tracer, symbol)
    if value.type.domain not in wanted:
        raise tracer.error(f"{what} needs {domains.a_value(*wanted)}, got {value.type}")
    return value


def _at_dst(tracer: Tracer, symbol: Any) -> Value:
    if isinstance(symbol, Argument):
        value = Value(tracer, symbol.at(symbol.rows("dst")))
    else:
        value = _expect(tracer, symbol, ("node", "dst"), "g.dst")
    return value if value.type.domain == "dst" else _emit(tracer, "prefix", value.id)


def _to_dst(tracer: Tracer, symbol: Any, what: str) -> str:
    value = _expect(tracer, symbol, ("edge", "dst_pair"), what)
    return f"{value.type.domain}.dst"


def _reduce_along(kind: str, name: str, symbol: Any) -> Value:
    tracer = _tracer(symbol)
    value = _expect(tracer, symbol, (domains.map_source(name),), f"a {kind} along {name}")
    return _emit(tracer, kind, value.id, attrs=(name,))


def _mean_along(name: str, symbol: Any) -> Value:
    total = _reduce_along("sum", name, symbol)
    tracer = total.tracer
    count = _emit(tracer, "degree", attrs=(name,))
    one = _bring(tracer, Value(tracer, tracer.const(1.0)), total.type.domain)
    return _emit(tracer, "div", total.id, _emit(tracer, "maximum", count.id, one.id).id)
