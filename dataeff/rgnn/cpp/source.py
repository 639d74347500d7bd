"""C++ for one traversal: nested loops with every unstored value in registers or small arrays.

A value of one element is a scalar. A wider one is a pointer into a stored array, an expression that
the loop reading it evaluates, or a local array when it is read twice. Sums run in one fixed order.
A score that one pass over the edges computes, and that the next one turns into a stored weight,
waits where the weight will stand; if the weight follows from it alone, in a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dataeff.rgnn import domains
from dataeff.rgnn.cpp import reductions
from dataeff.rgnn.cpp.ahead import Lookahead
from dataeff.rgnn.cpp.text import Block, Ref, Row, array_ref, flat, loops
from dataeff.rgnn.cpp.values import Values
from dataeff.rgnn.ir import Op, Program, Type
from dataeff.rgnn.kernels_ir import Schedule, Traversal, closure
from dataeff.rgnn.lower import COSTLY
from dataeff.rgnn.memory_plan import ELEMENTWISE, overwritten
from dataeff.rgnn.phases import Pass, Phases
from dataeff.rgnn.signatures import SEGMENT


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
        # A value that stands where the result is written has no pointer of its own.
        operand = overwritten(schedule).get(number)
        self.in_place = {} if operand is None else {operand: self.kept[0]}
        self.outer = Block("      ")
        self.inner = Block("        ")
        self.bounds: dict[str, str] = {}  # map -> the variable with a chunk's last inner row
        self.ahead = {"inner": Lookahead("t"), "outer": Lookahead("i")}
        held: set[int] = set(kernel.sinks)
        for sink in kernel.sinks:
            held |= closure(self.program, self.stored, sink)
        # What is costly and stored is not computed once more for those that read it here.
        readers = {v: int(v in self.kept and self.program[v].kind in COSTLY) for v in held}
        for v in held:
            for arg in self.program[v].args:
                readers[arg] = readers.get(arg, 0) + 1
        self.values = Values(readers)

    # -- names ------------------------------------------------------------------------------------

    def argument(self, kind: str, what: int | str) -> str:
        what = self.in_place.get(what, what) if isinstance(what, int) else what
        key = (kind, what)
        if key not in self.arguments:
            label = str(what).replace(".", "_")
            self.arguments[key] = f"v{label}" if kind == "value" else f"{kind}_{label}"
        return self.arguments[key]

    # -- the function -----------------------------------------------------------------------------

    def write(self) -> KernelSource:
        center = Row(self.kernel.center, "i", "outer")
        self.ahead["outer"].start("i", "u", scattered=False)
        phases = Phases(self.schedule, self.kernel)
        waiting = self._waiting(phases)
        for number, step in enumerate(phases.passes()):
            made = {s: v for s, v in waiting.items() if phases.of(v) == number}
            read = {s: v for s, v in waiting.items() if phases.of(s) == number}
            self._phase(step, center, made, read)
        for sink in self.kernel.sinks:
            if not phases.is_inner_store(sink):
                self._store(self.outer, sink, self.emit(sink, center), center)
        return KernelSource(self.name, self._function(), tuple(self.arguments))

    def _waiting(self, phases: Phases) -> dict[int, int]:
        """By stored value of the inner rows, what it is computed from in a later pass.

        That is what an earlier pass reduces, or another costly value that it computes.
        """
        found: dict[int, int] = {}
        reduced = {op.args[0] for s in self.kernel.sinks if (op := self.program[s]).kind in SEGMENT}
        # What is overwritten is read until its row is there.
        sinks = {s for s in self.kernel.sinks if s in self.kept and phases.is_inner_store(s)}
        sinks -= {*self.in_place.values()}
        for sink in sorted(sinks, key=phases.of):
            kind, stack = self.program[sink].type, [sink]
            while stack:
                op = self.program[stack.pop()]
                waits = op.id in reduced or (op.kind in COSTLY and op.kind not in ELEMENTWISE)
                if waits and phases.of(op.id) < phases.of(sink):
                    if op.id not in found.values():
                        found[sink] = op.id
                    break
                if op.kind in ELEMENTWISE:
                    stack += [a for a in op.args if self._computed(a, kind)]
        return found

    def _computed(self, value: int, kind: Type) -> bool:
        return value not in self.stored and self.program[value].type == kind

    def _phase(self, step: Pass, center: Row, made: dict[int, int], read: dict[int, int]) -> None:
        """One pass over the inner rows.

        It leaves values `made` where later passes store others, and finds those to be `read` there.
        """
        assert self.kernel.map is not None
        self.inner = Block("        ")
        row = Row(domains.map_source(self.kernel.map), "e", "inner")
        self._start_ahead()
        stored_ahead = {s for s, value in read.items() if self._of_one_row(s, value)}
        for sink, value in read.items():
            op = self.program[sink]
            place = f"({self.argument('value', sink)} + {row.name} * {op.type.numel})"
            there = array_ref(place, op.type.shape)
            if sink in stored_ahead:
                self._store_ahead(sink, value, there, row)
            else:
                self.inner.known[value, row.name] = self.values.to_array(there, self.inner)
        accumulators = {s: reductions.start(self.program[s], self.outer) for s in step.reductions}
        for value in step.reductions:
            op = self.program[value]
            if value not in step.tops:
                item = self.emit(op.args[0], row)
                reductions.accumulate(op, accumulators[value], item, self.inner)
        for value in step.stores:
            if value not in stored_ahead:
                self._store(self.inner, value, self.emit(value, row), row)
        for sink, value in made.items():
            self._store(self.inner, sink, self.emit(value, row), row)
        if self.inner.lines:
            self._loop()
        begin, end = (self.argument(kind, self.kernel.map) for kind in ("begin", "end"))
        for value in sorted(step.reductions, key=lambda v: v in step.tops):
            op = self.program[value]
            if value in step.tops:
                logsum = accumulators[step.tops[value]]
                reductions.take_top(op, accumulators[value], logsum, self.outer)
            reductions.finish(op, accumulators[value], self.outer, f"{begin}[i] == {end}[i]")
            self.outer.known[value, center.name] = array_ref(accumulators[value], op.type.shape)

    def _of_one_row(self, sink: int, waiting: int) -> bool:
        """Whether a value follows from one that waits and the center's, and rows are in order."""
        if self.has_items(str(self.kernel.map)):
            return False
        stack = list(self.program[sink].args)
        while stack:
            op = self.program[stack.pop()]
            of_center = op.kind == "const" or (op.kind == "gather" and op.map == self.kernel.map)
            if op.id == waiting or of_center:
                continue
            if op.id in self.stored or op.kind not in ELEMENTWISE:
                return False
            stack += op.args
        return True

    def _store_ahead(self, sink: int, waiting: int, there: Ref, row: Row) -> None:
        """Compute what waits in a loop of its own, which takes a vector of rows at a time."""
        inner, self.inner = self.inner, Block("        ", known={(waiting, row.name): there})
        self._store(self.inner, sink, self.emit(sink, row), row)
        self._loop()
        self.inner = inner
        self.inner.known[sink, row.name] = there

    def _loop(self) -> None:
        name = self.kernel.map
        assert name is not None
        begin, end = self.argument("begin", name), self.argument("end", name)
        out = self.outer
        out.add(f"for (int64_t t = {begin}[i]; t < int64_t({end}[i]); ++t) {{")
        items = f"{self.argument('items', name)}[t]" if self.has_items(name) else "t"
        out.add(f"  const int64_t e = {items};")
        # Segments follow one another, so that looking ahead reaches into the next ones.
        for line in self.ahead["inner"].lines(bound := f"ahead_{end}"):
            self.bounds[name] = bound
            out.add(f"  {line}")
        out.lines += self.inner.lines
        out.add("}")

    def _store(self, block: Block, value: int, ref: Ref, row: Row) -> None:
        if value not in self.kept:
            return
        op = self.program[value]
        index, head, tail = loops(op.type.shape)
        where = f"{row.name} * {op.type.numel} + {flat(index, op.type.shape)}"
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
        if op.type.domain not in domains.TYPE_DOMAINS:  # parameters are few, and in the cache
            self.ahead[row.level].read(base, row.name, size)
        if size == 1:
            name = self.values.fresh("s")
            block.add(f"const T {name} = {base}[{start}];")
            return Ref(op.type.shape, lambda index: name)
        name = self.values.fresh("p")
        block.add(f"const T* const {name} = {base} + {start};")
        return array_ref(name, op.type.shape)

    def _start_ahead(self) -> None:
        """The inner row of iteration `u`."""
        name = self.kernel.map
        assert name is not None
        items = self.has_items(name)
        number = f"int64_t({self.argument('items', name)}[u])" if items else "u"
        self.ahead["inner"].start("e", number, scattered=items)

    def _compute(self, op: Op, row: Row, block: Block) -> Ref:
        if op.kind == "const":
            return Ref((), lambda index: f"T({float(op.attrs[0])!r})")  # type: ignore[arg-type]
        if op.kind == "degree":
            begin, end = self.argument("begin", op.map), self.argument("end", op.map)
            self.ahead[row.level].read(end, row.name, 1)
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
                return array_ref(source.array, op.type.shape)
        if op.kind == "reduce":
            return self.values.reduce(op, self.emit(op.args[0], row), block)
        refs = [self.emit(a, row) for a in op.args]
        return self.values.elementwise(op, refs, block)

    def _read_through(self, value: int, there: Row, here: Row) -> Ref:
        ref = self.emit(value, there)
        if ref.lazy and there.level != here.level:  # once per outer row, not once per inner row
            ref = self.outer.known[value, there.name] = self.values.to_array(ref, self.outer)
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
        variable = self.values.fresh("r")
        index = self.argument("index", name)
        block.add(f"const int64_t {variable} = {index}[{row.name}];")
        self.ahead[row.level].follow(variable, index, row.name)
        block.rows[key] = Row(domains.map_target(name), variable, row.level)
        return block.rows[key]

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
            return self.values.product(op, x, w, block)
        return self.values.transposed_product(op, x, w, block)

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
                *(f"      {line}" for line in self.ahead["outer"].lines("last")),
                *self.outer.lines,
                "    }",
                "  });",
                "}",
                "",
            ]
        )
