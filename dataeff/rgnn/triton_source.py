"""Triton for one traversal: a program per few center rows, their inner rows a block at a time.

A traversal with inner rows is two kernels: one for center rows of at most `Choice.long_row` inner
rows, several to a program, and one, of twice the warps, for the longer ones, which a list names: a
program for each. Every row belongs to one of them, so sums keep their order. They are taken in
float32 (float64 for float64).

Inner rows of several center rows lie side by side, the center rows innermost. So laid over threads,
a warp reads whole rows, and what a thread sums for one center row it has read itself: most graphs
have few inner rows to a center row, and a program for each would leave most of its threads idle.
"""

from __future__ import annotations

from dataclasses import dataclass

from dataeff.rgnn import domains, triton_reductions, triton_values
from dataeff.rgnn.ir import Op
from dataeff.rgnn.kernels_ir import Schedule, Traversal
from dataeff.rgnn.phases import Pass, Phases
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.triton_text import Block, Row, lane, padded, padded_numel, trail

# Center rows of a program, and inner rows of each that it reads at a time.
MAX_ROWS, INNER_ROWS = 128, 4
# Inner rows that a program for one long row reads at a time.
LONG_BLOCK = 64
# How traversals are compiled. Left to itself, the assembler spills 8 bytes of some kernels to stay
# at 40 registers. A product fused with the subtraction of a maximum is not the product whose
# maximum it is, which takes three digits from the softmax of scores of 1e4.
MAX_REGISTERS, FP_FUSION = 255, False

_SHORT_ROWS = ["i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)", "i_mask = i < rows"]
_LONG_ROW = [
    "row = tl.load(long_rows + tl.program_id(0)).to(tl.int64)",
    "if row < 0:  # the host launches an upper bound of the number of long rows",
    "    return",
    "i = row + tl.arange(0, 1)",
    "i_mask = i < rows",
]


@dataclass(frozen=True)
class TritonKernel:
    """A generated kernel, its arguments in order, and how to launch it.

    `block` is the number of inner rows that it reads at a time for each of `rows_per_program`
    center rows. With `map`, the text holds `<name>_long` beside it: it takes the list of rows that
    have more than `long_row` inner rows along the map, then what the kernel takes, and has
    `long_warps` and a block of `long_block`.
    """

    name: str
    text: str
    arguments: tuple[tuple[str, int | str], ...]
    rows_per_program: int
    num_warps: int
    map: str | None = None
    long_warps: int = 8
    long_row: int = 128
    block: int = 1
    long_block: int = 1


def traversal_kernel(
    schedule: Schedule,
    number: int,
    contiguous: tuple[str, ...],
    double: bool,
    choice: Choice | None = None,
) -> TritonKernel:
    """Generate the kernel of the traversal that is step `number`.

    `choice` has the sizes of its blocks, its warps and what a long row is.
    """
    return _Writer(schedule, number, contiguous, double, choice or Choice()).write()


class _Writer:
    def __init__(
        self,
        schedule: Schedule,
        number: int,
        contiguous: tuple[str, ...],
        double: bool,
        choice: Choice,
    ) -> None:
        self.choice = choice
        kernel = schedule.steps[number]
        assert isinstance(kernel, Traversal)
        self.schedule, self.kernel = schedule, kernel
        self.program, self.stored = schedule.program, schedule.stored
        self.kept = schedule.kept(number)
        self.name = f"k{number}"
        self.contiguous = contiguous
        self.type = "tl.float64" if double else "tl.float32"
        self.arguments: dict[tuple[str, int | str], str] = {}
        self.outer, self.inner = Block("    "), Block("        ")
        self.counter = 0
        self.widest = 1

    def argument(self, kind: str, what: int | str) -> str:
        label = str(what).replace(".", "_")
        name = f"v{label}" if kind == "value" else f"{kind}_{label}"
        return self.arguments.setdefault((kind, what), name)

    def fresh(self, stem: str) -> str:
        self.counter += 1
        return f"{stem}{self.counter}"

    # -- the kernel -------------------------------------------------------------------------------

    def write(self) -> TritonKernel:
        center = Row(self.kernel.center, "i", "i_mask", "outer")
        phases = Phases(self.schedule, self.kernel)
        for step in phases.passes():
            self._pass(step, center)
        for sink in self.kernel.sinks:
            if not phases.is_inner_store(sink):
                self._store(self.outer, sink, self.emit(sink, center), center)
        elements = max(1, self.choice.block_elements // self.widest)
        if self.kernel.map is not None:
            return self._short_and_long(self.kernel.map, elements)
        rows = min(MAX_ROWS, elements)
        text = self._function(self.name, "", _SHORT_ROWS, rows, 1)
        arguments = tuple(self.arguments)
        return TritonKernel(self.name, text, arguments, rows, self._warps(rows), block=rows)

    def _short_and_long(self, name: str, elements: int) -> TritonKernel:
        """Both kernels along a map, which hold `elements` rows of the widest value at a time."""
        block = min(INNER_ROWS, elements)
        rows = min(MAX_ROWS, elements // block)
        long = min(LONG_BLOCK, 2 * elements)
        bounds, steps = self._bounds(name), "steps = tl.max(last - first, 0)"
        only_short = [
            f"i_mask = i_mask & (last - first <= {self.choice.long_row})",
            "last = tl.where(i_mask, last, first)",
        ]
        short_head = [*_SHORT_ROWS, *bounds, *only_short, steps]
        long_head = [*_LONG_ROW, *bounds, steps]
        texts = [
            self._function(self.name, "", short_head, rows, block),
            self._function(f"{self.name}_long", "long_rows, ", long_head, 1, long),
        ]
        return TritonKernel(
            *(self.name, "\n".join(texts), tuple(self.arguments), rows),
            *(self._warps(rows * block), name, 2 * self._warps(long // 2)),
            *(self.choice.long_row, block, long),
        )

    def _warps(self, rows: int) -> int:
        """Warps for so many rows at a time: one where they are narrow."""
        return self.choice.num_warps if rows * self.widest >= 1024 else 1

    def _bounds(self, name: str) -> list[str]:
        """Where the inner rows of each center row begin and end."""
        begin, end = self.argument("begin", name), self.argument("end", name)
        return [
            f"first = tl.load({begin} + i, mask=i_mask, other=0)",
            f"last = tl.load({end} + i, mask=i_mask, other=0)",
        ]

    def _function(self, name: str, first: str, head: list[str], rows: int, block: int) -> str:
        names = first + ", ".join([*self.arguments.values(), "rows"])
        along = f" along {self.kernel.map}" if self.kernel.map else ""
        kind = ", long rows" if first else ""
        text = "\n".join(
            [
                "",
                f"# traversal over {self.kernel.center}{along}{kind}",
                # How many rows there are changes with each sampled block: one program for all.
                '@triton.jit(do_not_specialize=["rows"])',
                f"def {name}({names}):",
                *(f"    {line}" for line in head),
                *self.outer.lines,
                "",
            ]
        )
        for size, number in (("LANES", rows * block), ("BLOCK", block), ("ROWS", rows)):
            text = text.replace(size, str(number))
        return text

    def _pass(self, step: Pass, center: Row) -> None:
        name = self.kernel.map
        assert name is not None
        self.inner = Block("        ")
        row = Row(domains.map_source(name), "e", "e_mask", "inner")
        sums = [self.program[v] for v in step.reductions if v not in step.tops]
        for op in sums:
            triton_reductions.start(op, self.outer, self.type)
        for op in sums:
            item = self.emit(op.args[0], row)
            triton_reductions.accumulate(op, item, self.inner, self.type)
        for value in step.stores:
            self._store(self.inner, value, self.emit(value, row), row)
        self._loop(name)
        for value, logsum in step.tops.items():
            triton_reductions.take_top(self.program[value], logsum, self.outer)
        for value in step.reductions:
            triton_reductions.finish(self.program[value], self.outer)
            self.outer.known[value, center.name] = f"acc{value}"

    def _loop(self, name: str) -> None:
        out = self.outer
        out.add("for t in range(0, steps, BLOCK):")
        out.add("    at = first[None, :] + (t + tl.arange(0, BLOCK))[:, None]")
        out.add("    e_mask = tl.reshape(at < last[None, :], [LANES])")
        out.add("    at = tl.reshape(at, [LANES])")
        if name in self.contiguous:
            out.add("    e = at.to(tl.int64)")
        else:
            items = self.argument("items", name)
            out.add(f"    e = tl.load({items} + at, mask=e_mask, other=0).to(tl.int64)")
        out.lines += self.inner.lines

    def _store(self, block: Block, value: int, name: str, row: Row) -> None:
        if value not in self.kept:
            return
        where, mask = self._address(self.argument("value", value), self.program[value], row)
        block.add(f"tl.store({where}, {name}, mask={mask})")

    # -- values -----------------------------------------------------------------------------------

    def emit(self, value: int, row: Row) -> str:
        """The variable that holds a value at a row, computed if it is not known there yet."""
        key = (value, row.name)
        for block in (self.inner, self.outer):
            if key in block.known:
                return block.known[key]
        block = self.inner if row.level == "inner" else self.outer
        op = self.program[value]
        if value in self.stored and value not in self.kernel.sinks:
            name = self._load(op, row, block)
        else:
            name = self._compute(op, row, block)
        block.known[key] = name
        return name

    def _address(self, base: str, op: Op, row: Row) -> tuple[str, str]:
        """Pointer and mask of a stored value at a row."""
        shape, rank = op.type.shape, len(op.type.shape)
        self.widest = max(self.widest, padded_numel(shape))
        terms = [f"{trail(row.name, rank)} * {op.type.numel}"]
        masks = [trail(row.mask, rank)] if row.mask else []
        stride = op.type.numel
        for axis, size in enumerate(shape):
            stride //= max(size, 1)
            index = lane(axis, shape)
            terms.append(f"{index} * {stride}" if stride != 1 else index)
            if padded(shape)[axis] != size:
                masks.append(f"({index} < {size})")
        return f"{base} + {' + '.join(terms)}", " & ".join(masks) or "None"

    def _load(self, op: Op, row: Row, block: Block) -> str:
        where, mask = self._address(self.argument("value", op.id), op, row)
        name = self.fresh("x")
        other = "" if mask == "None" else f", mask={mask}, other=0"
        block.add(f"{name} = tl.load({where}{other}).to({self.type})")
        return name

    def _compute(self, op: Op, row: Row, block: Block) -> str:
        if op.kind == "gather":
            there = self._follow(op.map, row, block)
            name = self.emit(op.args[0], there)
            is_center = row.level == "inner" and there.name == "i"
            return self._beside_inner_rows(name, op) if is_center else name
        if op.kind == "prefix":
            return self.emit(op.args[0], Row("node", row.name, row.mask, row.level))
        name = self.fresh("x")
        block.add(f"{name} = {self._expression(op, row, block)}")
        self.widest = max(self.widest, padded_numel(op.type.shape))
        return name

    def _beside_inner_rows(self, name: str, op: Op) -> str:
        """A value of the center rows, once for each of their inner rows."""
        beside = self.fresh("b")
        shape = "".join(f", {n}" for n in padded(op.type.shape))
        wide = f"tl.broadcast_to(tl.expand_dims({name}, 0), [BLOCK, ROWS{shape}])"
        self.outer.add(f"{beside} = tl.reshape({wide}, [LANES{shape}])")
        return beside

    def _expression(self, op: Op, row: Row, block: Block) -> str:
        if op.kind == "const":
            return f"tl.full([1], {float(op.attrs[0])!r}, {self.type})"  # type: ignore[arg-type]
        if op.kind == "degree":
            begin, end = self.argument("begin", op.map), self.argument("end", op.map)
            ends = [f"tl.load({p} + {row.name}, mask={row.mask}, other=0)" for p in (end, begin)]
            return f"({ends[0]} - {ends[1]}).to({self.type})"
        if op.kind in ("linear", "linear_t"):
            return self._product(op, row, block)
        shapes = [self.program[a].type.shape for a in op.args]
        names = [self.emit(a, row) for a in op.args]
        return triton_values.elementwise(op, names, shapes, self.type)

    def _follow(self, name: str, row: Row, block: Block) -> Row:
        if name == self.kernel.map and row.name == "e":
            return Row(self.kernel.center, "i", "i_mask", "outer")
        if name.endswith(".one"):
            key = ("one", "zero")
            if key not in self.outer.rows:
                self.outer.add("zero = tl.zeros([1], tl.int64)")
                self.outer.rows[key] = Row("one", "zero", "", "outer")
            return self.outer.rows[key]
        key = (name, row.name)
        for known in (self.inner, self.outer):
            if key in known.rows:
                return known.rows[key]
        variable = self.fresh("r")
        index = self.argument("index", name)
        other = f", mask={row.mask}, other=0" if row.mask else ""
        block.add(f"{variable} = tl.load({index} + {row.name}{other}).to(tl.int64)")
        block.rows[key] = Row(domains.map_target(name), variable, row.mask, row.level)
        return block.rows[key]

    def _product(self, op: Op, row: Row, block: Block) -> str:
        """A narrow product with the row's typed weight, over padded axes that load as zero."""
        x, weight = self.program[op.args[0]], self.program[op.args[1]]
        left = self.emit(x.id, row)
        target = weight.type.domain
        there = row
        if row.domain != target:
            there = self._follow(f"{row.domain}.{target}", row, block)
        w = self.emit(weight.id, there)
        self.widest = max(self.widest, padded_numel(weight.type.shape))
        return triton_values.product(op, left, x.type.shape, w, weight.type.shape)
