"""Layers of random operations on values of every row domain, as text that a failure can show."""

from math import prod

from rgnn_layers import NODE_TYPES

from dataeff import rgnn

SHAPES = ((), (1,), (2,), (3,), (6,), (2, 3), (3, 1))
MOST_ELEMENTS = 24
FUNCTIONS = (
    *("rgnn.tanh({})", "rgnn.sigmoid({})", "rgnn.relu({})", "rgnn.gelu({})", "-{}", "1.0 - {}"),
    *("rgnn.leaky_relu({}, 0.2)", "rgnn.exp(rgnn.tanh({}))", "rgnn.sqrt(1.5 + rgnn.tanh({}))"),
    *("rgnn.log(2.0 + rgnn.tanh({}))", "rgnn.tanh({}) ** 3", "2.0 / (2.0 + rgnn.tanh({}))"),
)
PRODUCTS = ("{} + {}", "{} - {}", "{} * {}", "{} / (1.5 + rgnn.tanh({}))")


class RandomLayer:
    """Draws a layer for a graph of so many nodes, edges and relations.

    Attributes:
        source: its text.
        shapes: of its arguments, by name.
    """

    def __init__(self, rnd, nodes, edges, relations):
        self.rnd, self.types = rnd, {"etype": relations, "ntype": NODE_TYPES}
        self.shapes, self.lines, self.values = {}, [], []
        x, e = self.argument("x", nodes, self.shape()), self.argument("e", edges, self.shape())
        self.add(f"g.node({x})", "node", self.shapes[x][1:])
        self.add(f"g.edge({e})", "edge", self.shapes[e][1:])
        self.add(f"g.src({x})", "edge", self.shapes[x][1:])
        self.add(rnd.choice(("g.in_degree()", "g.at_dst(g.out_degree())")), "dst", ())
        self.add("g.degree_norm()", "edge", ())
        steps = (self.function, self.product, self.linear, self.dot, self.outer, self.concat)
        steps += (self.split, self.reshape, self.softmax, self.move, self.reduce, self.reduce)
        for _ in range(rnd.randint(6, 18)):
            rnd.choice(steps)(*rnd.choice(self.values[-6:]))
        self.add(f"g.sum({self.last('edge')})", "dst", self.shapes[e][1:])
        found = [
            f"g.sum({name})" if domain == "dst_pair" else name
            for name, domain, _ in self.values
            if name == self.last("dst") or rnd.random() < 0.3
        ]
        body = "".join(f"    {line}\n" for line in self.lines)
        head = f"def layer({', '.join(['g', *self.shapes])}):\n"
        self.source = f"{head}{body}    return {', '.join(found)}\n"

    def compiled(self):
        """The layer."""
        names = {"rgnn": rgnn}
        exec(self.source, names)
        return rgnn.layer(names["layer"])

    def last(self, domain):
        return [name for name, d, _ in self.values if d == domain][-1]

    def shape(self):
        return self.rnd.choice(SHAPES)

    def argument(self, kind, rows, shape):
        """An argument, or one that is there already."""
        whole = shape if rows is None else (rows, *shape)
        same = [a for a, s in self.shapes.items() if a.startswith(kind) and s == whole]
        if same and self.rnd.random() < 0.4:
            return self.rnd.choice(same)
        name = f"{kind}{len(self.shapes)}"
        self.shapes[name] = whole
        return name

    def parameter(self, domain, shape):
        keys = {"edge": "etype", "dst_pair": "etype", "node": "ntype", "dst": "ntype"}
        if self.rnd.random() < 0.4:
            return self.argument("p", None, shape)
        key = keys[domain]
        return f"{self.argument(key, self.types[key], shape)}[g.{key}]"

    def add(self, text, domain, shape):
        if prod(shape) <= MOST_ELEMENTS:
            self.values.append((f"v{len(self.values)}", domain, tuple(shape)))
            self.lines.append(f"{self.values[-1][0]} = {text}")

    def other(self, domain, fits):
        """A value of a domain whose shape fits, or a parameter for it."""
        found = [(v, s) for v, d, s in self.values if d == domain and fits(s)]
        return self.rnd.choice(found) if found else (None, None)

    # Each appends one operation on a value, if the value takes it.

    def function(self, value, domain, shape):
        self.add(self.rnd.choice(FUNCTIONS).format(value), domain, shape)

    def product(self, value, domain, shape):
        other, right = self.other(domain, lambda s: s in (shape, shape[:1], ()))
        formula = self.rnd.choice(PRODUCTS)
        if "tanh" not in formula and self.rnd.random() < 0.4:
            other = self.parameter(domain, right)
        self.add(formula.format(value, other), domain, shape)

    def linear(self, value, domain, shape):
        if shape:
            out = self.rnd.choice(((), (1,), (4,), (2, 2), (12,)))
            weight = self.parameter(domain, shape + out)
            self.add(f"rgnn.linear({value}, {weight})", domain, shape[:-1] + out)

    def dot(self, value, domain, shape):
        if shape:
            self.add(f"rgnn.dot({value}, {self.parameter(domain, shape)})", domain, shape[:-1])

    def outer(self, value, domain, shape):
        other, right = self.other(domain, lambda s: len(s) == 1)
        if len(shape) == 1 and other:
            self.add(f"rgnn.outer({value}, {other})", domain, shape + right)

    def concat(self, value, domain, shape):
        other, right = self.other(domain, lambda s: s and s[:-1] == shape[:-1])
        if shape and other:
            joined = (*shape[:-1], shape[-1] + right[-1])
            self.add(f"rgnn.concat({value}, {other})", domain, joined)

    def split(self, value, domain, shape):
        if shape and shape[-1] > 1:
            cut = self.rnd.randint(1, shape[-1] - 1)
            sizes = (cut, shape[-1] - cut)
            at = self.rnd.randint(0, 1)
            self.add(f"rgnn.split({value}, {sizes})[{at}]", domain, (*shape[:-1], sizes[at]))

    def reshape(self, value, domain, shape):
        size = prod(shape)
        made = self.rnd.choice([(size,), *((n, size // n) for n in (1, 2, 3) if size % n == 0)])
        self.add(f"rgnn.reshape({value}, {', '.join(map(str, made))})", domain, made)

    def softmax(self, value, domain, shape):
        if domain == "edge":
            within = self.rnd.random() < 0.3
            self.add(f"rgnn.edge_softmax({value}, per_relation={within})", domain, shape)

    def move(self, value, domain, shape):
        if domain in ("node", "dst"):
            self.add(f"g.{'src' if domain == 'node' else 'dst'}({value})", "edge", shape)

    def reduce(self, value, domain, shape):
        kind = self.rnd.choice(("sum", "mean", "max"))
        if domain == "edge" and self.rnd.random() < 0.3:
            self.add(f"g.per_relation.{kind}({value})", "dst_pair", shape)
        elif domain in ("edge", "dst_pair"):
            self.add(f"g.{kind}({value})", "dst", shape)
