"""C++ for one traversal: nested loops with every unstored value in registers or small arrays.

A value of one element is a scalar. A wider one is a pointer into a stored array, an expression that
the loop reading it evaluates, or a local array when it is read twice. Sums run in one fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Op, Program
from dataeff.rgnn.kernels_ir import Schedule, Traversal
from dataeff.rgnn.lower import closure
from dataeff.rgnn.phases import Pass, Phases
from dataeff.rgnn.signatures import BINARY, UNARY

Shape = tuple[int, ...]

_FORMULA = {
    "neg": "-({0})",
    "exp": "std::exp({0})",
    "log": "std::log({0})",
    "sqrt": "std::sqrt({0})",
    "tanh": "std::tanh({0})",
    "sigmoid": "T(1) / (T(1) + std::exp(-({0})))",
    "relu": "relu({0})",
    "leaky_relu": "leaky_relu({0}, T({a}))",
    "slope": "(({0}) > T(0) ? T(1) : T({a}))",
    "gelu": "gelu({0})",
    "gelu_grad": "gelu_grad({0})",
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "maximum": "std::max({0}, {1})",
    "equal": "T({0} == {1})",
}


# A row of fewer elements shares its cache line with others, which bring it in.
PREFETCH_ELEMENTS = 16


@dataclass(frozen=True)
class Row:
    """A row of a domain, held in a C++ variable, known in the outer or the inner loop."""

    domain: str
    name: str
    level: str


@dataclass(frozen=True)
class Ref:
    """How to read a value: `at` maps one index per axis to an expression."""

    shape: Shape
    at: Callable[[list[str]], str]
    lazy: bool = False  # evaluated by each loop that reads it
    array: str = ""  # the array or pointer it is read from, row-major


@dataclass
class Block:
    """Lines of one loop body, and the values already computed in it."""

    indent: str
    lines: list[str] = field(default_factory=list)
    known: dict[tuple[int, str], Ref] = field(default_factory=dict)
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(self, line: str) -> None:
        """Append a line."""
        self.lines.append(self.indent + line)


@dataclass(frozen=True)
class KernelSource:
    """A generated function and what to pass it, in order.

    Arguments are `("value", id)` for a stored array, or ("index" | "begin" | "end" | "items", map).
    """

    name: str
    text: str
    arguments: tuple[tuple[str, int | str], ...]


def traversal_source(
    schedule: Schedule, number: int, has_items: Callable[[str], bool]
) -> KernelSource:
    """Generate the function of the traversal that is step `number`."""
    return _Writer(schedule, number, has_items).write()


class _Writer:
    def __init__(self, schedule: Schedule, number: int, has_items: Callable[[str], bool]) -> None:
        kernel = schedule.steps[number]
        assert isinstance(kernel, Traversal)
        self.kept = schedule.kept(number)
        self.schedule = schedule
        self.program: Program = schedule.program
        self.stored = schedule.stored
        self.kernel = kernel
        self.name = f"k{number}"
        self.has_items = has_items
        self.arguments: dict[tuple[str, int | str], str] = {}
        self.outer = Block("      ")
        self.inner = Block("        ")
        self.counter = 0
        self.bounds: dict[str, str] = {}  # map -> the variable with a chunk's last inner row
        self.followed: dict[str, tuple[str, str]] = {}  # row variable -> (its index array, from)
        self.distant: dict[str, int] = {}  # text of an address one inner row ahead -> elements
        held: set[int] = set(kernel.sinks)
        for sink in kernel.sinks:
            held |= closure(self.program, self.stored, sink)
        self.readers = {v: 0 for v in held}
        for v in held:
            for arg in self.program[v].args:
                self.readers[arg] = self.readers.get(arg, 0) + 1

    # -- names ------------------------------------------------------------------------------------

    def argument(self, kind: str, what: int | str) -> str:
        key = (kind, what)
        if key not in self.arguments:
            label = str(what).replace(".", "_")
            self.arguments[key] = f"v{label}" if kind == "value" else f"{kind}_{label}"
        return self.arguments[key]

    def fresh(self, stem: str) -> str:
        self.counter += 1
        return f"{stem}{self.counter}"

    # -- the function -----------------------------------------------------------------------------

    def write(self) -> KernelSource:
        center = Row(self.kernel.center, "i", "outer")
        phases = Phases(self.schedule, self.kernel)
        for step in phases.passes():
            self._phase(step, center)
        for sink in self.kernel.sinks:
            if not phases.is_inner_store(sink):
                self._store(self.outer, sink, self.emit(sink, center), center)
        return KernelSource(self.name, self._function(), tuple(self.arguments))

    def _phase(self, step: Pass, center: Row) -> None:
        """One pass over the inner rows."""
        assert self.kernel.map is not None
        self.inner = Block("        ")
        row = Row(domains.map_source(self.kernel.map), "e", "inner")
        accumulators = {s: self._start(self.program[s]) for s in step.reductions}
        for value in step.reductions:
            op = self.program[value]
            self._accumulate(op, accumulators[value], self.emit(op.args[0], row))
        for value in step.stores:
            self._store(self.inner, value, self.emit(value, row), row)
        self._loop()
        for value in step.reductions:
            op = self.program[value]
            self._finish(op, accumulators[value])
            self.outer.known[value, center.name] = _array(accumulators[value], op.type.shape)

    def _loop(self) -> None:
        name = self.kernel.map
        assert name is not None
        begin, end = self.argument("begin", name), self.argument("end", name)
        out = self.outer
        out.add(f"for (int64_t t = {begin}[i]; t < int64_t({end}[i]); ++t) {{")
        items = f"{self.argument('items', name)}[t]" if self.has_items(name) else "t"
        out.add(f"  const int64_t e = {items};")
        if self.distant:
            # Segments follow one another, so that looking ahead reaches into the next ones.
            self.bounds.setdefault(name, f"ahead_{end}")
            out.add(f"  if (t + kAhead < {self.bounds[name]}) {{")
            out.add("    const int64_t u = t + kAhead;")
            for address, size in self.distant.items():
                out.add(f"    prefetch<{size}>({address});")
            out.add("  }")
            self.distant.clear()
        out.lines += self.inner.lines
        out.add("}")

    # -- reductions -------------------------------------------------------------------------------

    def _start(self, op: Op) -> str:
        name, size = f"acc{op.id}", op.type.numel
        first = "T(0)" if op.kind == "sum" else "-INFINITY"
        self.outer.add(f"T {name}[{size}]; for (int j = 0; j < {size}; ++j) {name}[j] = {first};")
        if op.kind == "logsumexp":
            self.outer.add(f"T {name}_top[{size}], {name}_sum[{size}];")
            self.outer.add(
                f"for (int j = 0; j < {size}; ++j) {{ {name}_top[j] = -INFINITY;"
                f" {name}_sum[j] = T(0); }}"
            )
        return name

    def _accumulate(self, op: Op, name: str, value: Ref) -> None:
        index, head, tail = _loops(op.type.shape)
        flat = _flat(index, op.type.shape)
        item = value.at(index)
        if op.kind == "sum":
            body = f"{name}[{flat}] += {item};"
        elif op.kind == "max":
            body = f"{name}[{flat}] = std::max({name}[{flat}], {item});"
        else:
            body = f"online({item}, {name}_top[{flat}], {name}_sum[{flat}]);"
        self.inner.add(f"{head}{body}{tail}")

    def _finish(self, op: Op, name: str) -> None:
        size = op.type.numel
        if op.kind == "logsumexp":
            each = f"{name}[j] = {name}_top[j] + std::log({name}_sum[j]);"
        elif op.kind == "max":
            each = f"if ({name}[j] == -INFINITY) {name}[j] = T(0);"
        else:
            return
        self.outer.add(f"for (int j = 0; j < {size}; ++j) {each}")

    def _store(self, block: Block, value: int, ref: Ref, row: Row) -> None:
        if value not in self.kept:
            return
        op = self.program[value]
        index, head, tail = _loops(op.type.shape)
        where = f"{row.name} * {op.type.numel} + {_flat(index, op.type.shape)}"
        block.add(f"{head}{self.argument('value', value)}[{where}] = {ref.at(index)};{tail}")

    # -- values -----------------------------------------------------------------------------------

    def emit(self, value: int, row: Row) -> Ref:
        """The value at a row, computed in that row's loop if it is not known there yet."""
        key = (value, row.name)
        for block in (self.inner, self.outer):
            if key in block.known:
                return block.known[key]
        block = self.inner if row.level == "inner" else self.outer
        op = self.program[value]
        if value in self.stored and value not in self.kernel.sinks:
            ref = self._load(op, row)
        else:
            ref = self._compute(op, row, block)
        block.known[key] = ref
        return ref

    def _load(self, op: Op, row: Row) -> Ref:
        base = self.argument("value", op.id)
        size = op.type.numel
        start = row.name if size == 1 else f"{row.name} * {size}"
        block = self.inner if row.level == "inner" else self.outer
        if size == 1:
            name = self.fresh("s")
            block.add(f"const T {name} = {base}[{start}];")
            return Ref(op.type.shape, lambda index: name)
        name = self.fresh("p")
        block.add(f"const T* const {name} = {base} + {start};")
        if row.level == "inner":
            self._ask_ahead(base, size, row.name)
        return _array(name, op.type.shape)

    def _ask_ahead(self, base: str, size: int, row: str) -> None:
        """Remember a wide row that is found through an index, to fetch it some rows ahead.

        Rows of one center are few and scattered, so neither the hardware's prefetcher nor the
        processor's window reaches the next ones; their indices are known, though.
        """
        where, indirect = self._ahead(row)
        if indirect and size >= PREFETCH_ELEMENTS:
            self.distant[f"{base} + {where} * {size}"] = size

    def _ahead(self, row: str) -> tuple[str, bool]:
        """A row's number for the inner row `u` ahead, and whether an index leads to it."""
        if row == "e":
            name = self.kernel.map
            assert name is not None
            items = self.has_items(name)
            return (f"int64_t({self.argument('items', name)}[u])" if items else "u"), items
        if row not in self.followed:
            return row, False
        index, source = self.followed[row]
        return f"int64_t({index}[{self._ahead(source)[0]}])", True

    def _compute(self, op: Op, row: Row, block: Block) -> Ref:
        if op.kind == "const":
            return Ref((), lambda index: f"T({float(op.attrs[0])!r})")  # type: ignore[arg-type]
        if op.kind == "degree":
            begin, end = self.argument("begin", op.map), self.argument("end", op.map)
            return Ref((), lambda index: f"T({end}[{row.name}] - {begin}[{row.name}])")
        if op.kind == "gather":
            return self._read_through(op.args[0], self._follow(op.map, row, block), row)
        if op.kind == "prefix":
            return self.emit(op.args[0], Row("node", row.name, row.level))
        if op.kind in ("linear", "linear_t"):
            return self._product(op, row, block)
        if op.kind == "reshape":
            source = self.emit(op.args[0], row)
            if source.array:
                return _array(source.array, op.type.shape)
        if op.kind == "reduce":
            return self._reduce(op, self.emit(op.args[0], row), block)
        refs = [self.emit(a, row) for a in op.args]
        return self._elementwise(op, refs, block)

    def _read_through(self, value: int, there: Row, here: Row) -> Ref:
        ref = self.emit(value, there)
        if ref.lazy and there.level != here.level:  # once per outer row, not once per inner row
            ref = self.outer.known[value, there.name] = self.to_array(ref, self.outer)
        return ref

    def _follow(self, name: str, row: Row, block: Block) -> Row:
        if name == self.kernel.map and row.level == "inner" and row.name == "e":
            return Row(self.kernel.center, "i", "outer")
        if name.endswith(".one"):
            return Row("one", "0", "outer")
        key = (name, row.name)
        for known in (self.inner, self.outer):
            if key in known.rows:
                return known.rows[key]
        variable = self.fresh("r")
        block.add(f"const int64_t {variable} = {self.argument('index', name)}[{row.name}];")
        self.followed[variable] = (self.argument("index", name), row.name)
        block.rows[key] = Row(domains.map_target(name), variable, row.level)
        return block.rows[key]

    def _keep(self, op: Op, ref: Ref, block: Block) -> Ref:
        """A scalar becomes a variable; a wide value read more than once becomes an array."""
        index, head, tail = _loops(op.type.shape)
        if op.type.numel == 1:
            name = self.fresh("s")
            block.add(f"const T {name} = {ref.at(['0'] * len(op.type.shape))};")
            return Ref(op.type.shape, lambda index: name)
        if self.readers.get(op.id, 0) <= 1:
            return ref
        name = self.fresh("a")
        flat = _flat(index, op.type.shape)
        block.add(f"T {name}[{op.type.numel}]; {head}{name}[{flat}] = {ref.at(index)};{tail}")
        return _array(name, op.type.shape)

    def _elementwise(self, op: Op, refs: list[Ref], block: Block) -> Ref:
        shape = op.type.shape
        if op.kind in UNARY or op.kind in BINARY:
            formula = _FORMULA[op.kind]
            constant = repr(float(op.attrs[0])) if op.attrs else ""  # type: ignore[arg-type]

            def at(index: list[str]) -> str:
                parts = [r.at(_broadcast(index, r.shape)) for r in refs]
                return formula.format(*parts, a=constant)

            refs = [self._narrow(r, shape, block) for r in refs]
            return self._keep(op, Ref(shape, at, lazy=True), block)
        reading = _RESHAPERS[op.kind](op, refs, self, block)
        return self._keep(op, Ref(shape, reading, lazy=True), block)

    def _narrow(self, ref: Ref, shape: Shape, block: Block) -> Ref:
        """A computed operand that is broadcast is computed once, not once per reading element."""
        size = prod(ref.shape)
        if size == 1 or size == prod(shape):
            return ref
        return self.to_array(ref, block)

    def to_array(self, ref: Ref, block: Block) -> Ref:
        """Copy a value into a local array."""
        index, head, tail = _loops(ref.shape)
        name = self.fresh("a")
        flat = _flat(index, ref.shape)
        block.add(f"T {name}[{prod(ref.shape)}]; {head}{name}[{flat}] = {ref.at(index)};{tail}")
        return _array(name, ref.shape)

    def _reduce(self, op: Op, ref: Ref, block: Block) -> Ref:
        shape, full = op.type.shape, ref.shape
        if shape == full[: len(shape)] and len(shape) == len(full) - 1:
            index, head, tail = _loops(shape)
            name = self.fresh("a")
            block.add(f"T {name}[{max(prod(shape), 1)}];")
            item = ref.at([*index, "k"])
            block.add(
                f"{head}{{ T sum = T(0);\n#pragma omp simd reduction(+ : sum)\n{block.indent}"
                f"for (int k = 0; k < {full[-1]}; ++k) sum += {item};"
                f" {name}[{_flat(index, shape)}] = sum; }}{tail}"
            )
            return _array(name, shape)
        index, head, tail = _loops(full)
        padded = shape + (1,) * (len(full) - len(shape))
        name = self.fresh("a")
        size = max(prod(shape), 1)
        block.add(f"T {name}[{size}]; for (int j = 0; j < {size}; ++j) {name}[j] = T(0);")
        where = _flat(_broadcast(index, padded), padded)
        block.add(f"{head}{name}[{where}] += {ref.at(index)};{tail}")
        return _array(name, shape)

    def _product(self, op: Op, row: Row, block: Block) -> Ref:
        """A narrow product with the row's typed weight."""
        x = self.emit(op.args[0], row)
        weight = self.program[op.args[1]]
        target = weight.type.domain
        level = Row(target, row.name, row.level)
        if row.domain != target:
            level = self._follow(f"{row.domain}.{target}", row, block)
        w = self.emit(weight.id, level)
        if op.kind == "linear":
            return self._forward_product(op, x, w, block)
        return self._transposed_product(op, x, w, block)

    def _forward_product(self, op: Op, x: Ref, w: Ref, block: Block) -> Ref:
        batch, width = x.shape[:-1], x.shape[-1]
        name, size = self.fresh("a"), max(op.type.numel, 1)
        out = op.type.shape[len(batch) :]
        b, head, tail = _loops(batch)
        o, out_head, out_tail = _loops(out, "o")
        where = _flat([*b, *o], op.type.shape)
        block.add(f"T {name}[{size}];")
        block.add(
            f"{head}{out_head}{{ T sum = T(0);\n#pragma omp simd reduction(+ : sum)\n{block.indent}"
            f"for (int k = 0; k < {width}; ++k) sum += {x.at([*b, 'k'])} * {w.at([*b, 'k', *o])};"
            f" {name}[{where}] = sum; }}{out_tail}{tail}"
        )
        return _array(name, op.type.shape)

    def _transposed_product(self, op: Op, y: Ref, w: Ref, block: Block) -> Ref:
        batch = int(op.attrs[0])  # type: ignore[arg-type]
        out = y.shape[batch:]
        if prod(out) == 1:
            zeros = ["0"] * len(out)

            def at(index: list[str]) -> str:
                return f"({y.at([*index[:batch], *zeros])} * {w.at([*index, *zeros])})"

            return self._keep(op, Ref(op.type.shape, at, lazy=True), block)
        index, head, tail = _loops(op.type.shape)
        o, out_head, out_tail = _loops(out, "o")
        name = self.fresh("a")
        term = f"{y.at([*index[:batch], *o])} * {w.at([*index, *o])}"
        block.add(
            f"T {name}[{op.type.numel}]; {head}{{ T sum = T(0); {out_head}sum += {term};{out_tail}"
            f" {name}[{_flat(index, op.type.shape)}] = sum; }}{tail}"
        )
        return _array(name, op.type.shape)

    # -- assembly ---------------------------------------------------------------------------------

    def _function(self) -> str:
        outputs = {("value", s) for s in self.kernel.sinks}
        declared = []
        for position, (key, name) in enumerate(self.arguments.items()):
            kind = ("" if key in outputs else "const ") + ("T" if key[0] == "value" else "I")
            cast = f"static_cast<{kind}*>(args[{position}])"
            declared.append(f"  {kind}* const __restrict {name} = {cast};")
        along = f" along {self.kernel.map}" if self.kernel.map else ""
        return "\n".join(
            [
                f"// traversal over {self.kernel.center}{along}",
                'extern "C" __attribute__((visibility("default")))',
                f"void {self.name}(void** args, int64_t rows, int64_t grain, int64_t threads) {{",
                *declared,
                "  dataeff::parallel_for(rows, grain, threads, [&](int64_t first, int64_t last) {",
                *(
                    f"    const int64_t {bound} = {self.argument('end', name)}[last - 1];"
                    for name, bound in self.bounds.items()
                ),
                "    for (int64_t i = first; i < last; ++i) {",
                *self.outer.lines,
                "    }",
                "  });",
                "}",
                "",
            ]
        )


def _loops(shape: Shape, stem: str = "j") -> tuple[list[str], str, str]:
    """Index per axis, loop heads and closing text; axes of size 1 need no loop."""
    index, head = [], ""
    for axis, size in enumerate(shape):
        if size == 1:
            index.append("0")
            continue
        name = f"{stem}{axis}"
        index.append(name)
        head += f"for (int {name} = 0; {name} < {size}; ++{name}) "
    return index, head, ""


def _flat(index: list[str], shape: Shape) -> str:
    terms = []
    stride = 1
    for name, size in zip(reversed(index), reversed(shape), strict=True):
        if size != 1 and name != "0":
            terms.append(name if stride == 1 else f"{name} * {stride}")
        stride *= size
    return " + ".join(reversed(terms)) or "0"


def _array(name: str, shape: Shape) -> Ref:
    return Ref(shape, lambda index: f"{name}[{_flat(index, shape)}]", array=name)


def _broadcast(index: list[str], shape: Shape) -> list[str]:
    """The index of a left-aligned operand."""
    return ["0" if n == 1 else i for i, n in zip(index[: len(shape)], shape, strict=True)]


_At = Callable[[list[str]], str]


def _expand(op: Op, refs: list[Ref], writer: _Writer, block: Block) -> _At:
    (x,) = refs
    x = writer._narrow(x, op.type.shape, block)
    return lambda index: x.at(_broadcast(index, x.shape))


def _reshape(op: Op, refs: list[Ref], writer: _Writer, block: Block) -> _At:
    array = refs[0] if refs[0].array else writer.to_array(refs[0], block)
    return lambda index: f"{array.array}[{_flat(index, op.type.shape)}]"


def _slice(op: Op, refs: list[Ref], writer: _Writer, block: Block) -> _At:
    (x,) = refs
    return lambda index: x.at([*index[:-1], f"({index[-1]} + {op.attrs[0]})"])


def _embed(op: Op, refs: list[Ref], writer: _Writer, block: Block) -> _At:
    (x,) = refs
    start, width = int(op.attrs[0]), x.shape[-1]  # type: ignore[arg-type]

    def at(index: list[str]) -> str:
        k = f"({index[-1]} - {start})"
        inside = f"{index[-1]} >= {start} && {index[-1]} < {start + width}"
        return f"({inside} ? {x.at([*index[:-1], k])} : T(0))"

    return at


def _concat(op: Op, refs: list[Ref], writer: _Writer, block: Block) -> _At:
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


_RESHAPERS: dict[str, Callable[[Op, list[Ref], _Writer, Block], _At]] = {
    "expand": _expand,
    "reshape": _reshape,
    "slice": _slice,
    "embed": _embed,
    "concat": _concat,
}
