"""Triton for one traversal: a program per center row, inner rows a block at a time.

A traversal with inner rows is two kernels: one for center rows of at most `Choice.long_row` inner
rows, and one, of twice the warps and twice the block, for the longer ones, which a list names.
Every row belongs to one of them, so sums keep their order.

Every value has a leading axis: 1 or ROWS for the center, BLOCK for inner rows; its other axes are
those of the row shape, padded to powers of two. Sums are taken in float32 (float64 for float64),
in one fixed order and without atomics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Op
from dataeff.rgnn.kernels_ir import Schedule, Traversal
from dataeff.rgnn.phases import Pass, Phases
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.signatures import BINARY, UNARY

Shape = tuple[int, ...]

MAX_BLOCK = 32
# Said aloud: left to itself, the assembler spills 8 bytes of some kernels to stay at 40 registers.
MAX_REGISTERS = 255

PRELUDE = """\
import triton
import triton.language as tl


@triton.jit
def maximum(x, y):  # as torch's: what is no number stays so
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_grad(x):
    density = tl.exp(-0.5 * x * x) * 0.3989422804014327
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density

"""

_FORMULA = {
    "neg": "-{0}",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})",
    "tanh": "tanh({0})",
    "sigmoid": "1 / (1 + tl.exp(-{0}))",
    "relu": "tl.where({0} < 0, 0, {0})",
    "leaky_relu": "tl.where({0} > 0, {0}, {0} * {a})",
    "slope": "tl.where({0} > 0, 1.0, {a})",
    "gelu": "gelu({0})",
    "gelu_grad": "gelu_grad({0})",
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "maximum": "maximum({0}, {1})",
    "equal": "tl.where({0} == {1}, 1.0, 0.0)",
}


_ROWS = "i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)"
_ROW = "i = row + tl.arange(0, 1)"


@dataclass(frozen=True)
class TritonKernel:
    """A generated kernel, its arguments in order, and how to launch it.

    With `map`, the text holds `<name>_long` beside it: it takes the list of rows that have more
    than `long_row` inner rows along the map, then what the kernel takes, and `long_warps`.
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


@dataclass(frozen=True)
class Row:
    """Rows of a domain in a variable, with the variable that masks them."""

    domain: str
    name: str
    mask: str
    level: str


@dataclass
class Block:
    """Lines of one loop body, and the values already computed in it."""

    indent: str
    lines: list[str] = field(default_factory=list)
    known: dict[tuple[int, str], str] = field(default_factory=dict)
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(self, line: str) -> None:
        """Append a line."""
        self.lines.append(self.indent + line)


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


def padded(shape: Shape) -> Shape:
    """A row shape with each axis rounded up to a power of two."""
    return tuple(1 << max(n - 1, 0).bit_length() for n in shape)


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
        block = max(1, min(MAX_BLOCK, self.choice.block_elements // self.widest))
        warps = self.choice.num_warps if block * self.widest >= 1024 else 1
        if self.kernel.map is None:
            text = self._function(self.name, "", [_ROWS])
            text = text.replace("BLOCK", str(block)).replace("ROWS", str(block))
            return TritonKernel(self.name, text, tuple(self.arguments), block, warps, block=block)
        begin, end = self.argument("begin", self.kernel.map), self.argument("end", self.kernel.map)
        short = [
            "row = tl.program_id(0).to(tl.int64)",
            f"if tl.load({end} + row) - tl.load({begin} + row) > {self.choice.long_row}:",
            "    return",
            _ROW,
        ]
        long = [
            "row = tl.load(long_rows + tl.program_id(0)).to(tl.int64)",
            "if row < 0:  # the host launches an upper bound of the number of long rows",
            "    return",
            _ROW,
        ]
        texts = [
            self._function(self.name, "", short).replace("BLOCK", str(block)),
            self._function(f"{self.name}_long", "long_rows, ", long).replace(
                "BLOCK", str(2 * block)
            ),
        ]
        arguments = tuple(self.arguments)
        return TritonKernel(
            *(self.name, "\n".join(texts), arguments, 1, warps),
            *(self.kernel.map, 2 * warps, self.choice.long_row, block),
        )

    def _function(self, name: str, first: str, head: list[str]) -> str:
        names = first + ", ".join([*self.arguments.values(), "rows"])
        along = f" along {self.kernel.map}" if self.kernel.map else ""
        kind = ", long rows" if first else ""
        return "\n".join(
            [
                "",
                f"# traversal over {self.kernel.center}{along}{kind}",
                "@triton.jit",
                f"def {name}({names}):",
                *(f"    {line}" for line in head),
                "    i_mask = i < rows",
                *self.outer.lines,
                "",
            ]
        )

    def _pass(self, step: Pass, center: Row) -> None:
        name = self.kernel.map
        assert name is not None
        self.inner = Block("        ")
        row = Row(domains.map_source(name), "e", "e_mask", "inner")
        for value in step.reductions:
            self._start(self.program[value])
        for value in step.reductions:
            op = self.program[value]
            self._accumulate(op, self.emit(op.args[0], row))
        for value in step.stores:
            self._store(self.inner, value, self.emit(value, row), row)
        self._loop(name)
        for value in step.reductions:
            self._finish(self.program[value])
            self.outer.known[value, center.name] = f"acc{value}"

    def _loop(self, name: str) -> None:
        out = self.outer
        begin, end = self.argument("begin", name), self.argument("end", name)
        if "first" not in {line.split(" = ")[0].strip() for line in out.lines}:
            out.add(f"first = tl.load({begin} + row)")
            out.add(f"last = tl.load({end} + row)")
        out.add("for t in range(first, last, BLOCK):")
        out.add("    at = t + tl.arange(0, BLOCK)")
        out.add("    e_mask = at < last")
        if name in self.contiguous:
            out.add("    e = at.to(tl.int64)")
        else:
            items = self.argument("items", name)
            out.add(f"    e = tl.load({items} + at, mask=e_mask, other=0).to(tl.int64)")
        out.lines += self.inner.lines

    # -- reductions -------------------------------------------------------------------------------

    def _start(self, op: Op) -> None:
        shape = [1, *padded(op.type.shape)]
        first = "0.0" if op.kind == "sum" else 'float("-inf")'
        self.outer.add(f"acc{op.id} = tl.full({shape}, {first}, {self.type})")
        if op.kind == "logsumexp":
            self.outer.add(f"sum{op.id} = tl.zeros({shape}, {self.type})")

    def _accumulate(self, op: Op, value: str) -> None:
        acc, rank = f"acc{op.id}", len(op.type.shape)
        # A value that does not depend on the inner row still counts once for each of them.
        full = [
            f"({value})",
            "tl.zeros(["
            + ", ".join(["BLOCK", *map(str, padded(op.type.shape))])
            + f"], {self.type})",
        ]
        mask = _trail("e_mask", rank)
        if op.kind == "sum":
            self.inner.add(f"{acc} += tl.sum(tl.where({mask}, {full[0]} + {full[1]}, 0), 0)[None]")
            return
        lowest = 'float("-inf")'
        x = self.fresh("x")
        self.inner.add(f"{x} = tl.where({mask}, {full[0]} + {full[1]}, {lowest})")
        if op.kind == "max":
            self.inner.add(f"{acc} = maximum({acc}, tl.reduce({x}, 0, maximum)[None])")
            return
        # The maximum may pass over what is no number: the sum of exponentials does not.
        top, safe = self.fresh("x"), self.fresh("x")
        self.inner.add(f"{top} = tl.maximum({acc}, tl.max({x}, 0)[None])")
        self.inner.add(f"{safe} = tl.where({top} == {lowest}, 0, {top})")
        self.inner.add(
            f"sum{op.id} = sum{op.id} * tl.exp({acc} - {safe})"
            f" + tl.sum(tl.exp({x} - {safe}), 0)[None]"
        )
        self.inner.add(f"{acc} = {top}")

    def _finish(self, op: Op) -> None:
        if op.kind == "logsumexp":
            total = (
                f"tl.where(sum{op.id} == 0, 1, sum{op.id})"  # without rows: -inf, and no log of 0
            )
            self.outer.add(f"acc{op.id} = acc{op.id} + tl.log({total})")
        elif op.kind == "max":
            self.outer.add(f'acc{op.id} = tl.where(acc{op.id} == float("-inf"), 0, acc{op.id})')

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
        self.widest = max(self.widest, _numel(padded(shape)))
        terms = [f"{_trail(row.name, rank)} * {op.type.numel}"]
        masks = [_trail(row.mask, rank)] if row.mask else []
        stride = op.type.numel
        for axis, size in enumerate(shape):
            stride //= max(size, 1)
            lane = _lane(axis, rank, padded(shape)[axis])
            terms.append(f"{lane} * {stride}" if stride != 1 else lane)
            if padded(shape)[axis] != size:
                masks.append(f"({lane} < {size})")
        return f"{base} + {' + '.join(terms)}", " & ".join(masks) or "None"

    def _load(self, op: Op, row: Row, block: Block) -> str:
        where, mask = self._address(self.argument("value", op.id), op, row)
        name = self.fresh("x")
        other = "" if mask == "None" else f", mask={mask}, other=0"
        block.add(f"{name} = tl.load({where}{other}).to({self.type})")
        return name

    def _compute(self, op: Op, row: Row, block: Block) -> str:
        if op.kind == "gather":
            return self.emit(op.args[0], self._follow(op.map, row, block))
        if op.kind == "prefix":
            return self.emit(op.args[0], Row("node", row.name, row.mask, row.level))
        name = self.fresh("x")
        block.add(f"{name} = {self._expression(op, row, block)}")
        self.widest = max(self.widest, _numel(padded(op.type.shape)))
        return name

    def _expression(self, op: Op, row: Row, block: Block) -> str:
        rank = len(op.type.shape)
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
        if op.kind == "reduce":
            return self._reduce(op, names[0], shapes[0])
        if op.kind == "reshape":
            return _trivial_reshape(names[0], shapes[0], op.type.shape)
        if op.kind == "expand":
            lanes = ", ".join(["1", *map(str, padded(op.type.shape))])
            return f"{_extend(names[0], len(shapes[0]), rank)} + tl.zeros([{lanes}], {self.type})"
        assert op.kind in UNARY or op.kind in BINARY, op.kind
        parts = [_extend(n, len(s), rank) for n, s in zip(names, shapes, strict=True)]
        # A bare number would be a float32 scalar, also beside float64 tensors.
        number = float(op.attrs[0]) if op.attrs else 0.0  # type: ignore[arg-type]
        constant = f"tl.full([1{', 1' * rank}], {number!r}, {self.type})"
        return _FORMULA[op.kind].format(*parts, a=constant)

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

    def _reduce(self, op: Op, name: str, full: Shape) -> str:
        shape = op.type.shape + (1,) * (len(full) - len(op.type.shape))
        axes = [a for a, n in enumerate(shape) if n == 1 and full[a] != 1]
        text = _masked(name, full, axes)
        for axis in reversed(axes):
            text = f"tl.sum({text}, {axis + 1})"
        # axes that are summed vanish; those of size 1 that the result keeps come back
        left = [n for a, n in enumerate(full) if a not in axes]
        return _trivial_reshape(text, tuple(left), op.type.shape)

    def _product(self, op: Op, row: Row, block: Block) -> str:
        """A narrow product with the row's typed weight, over padded axes that load as zero."""
        x, weight = self.program[op.args[0]], self.program[op.args[1]]
        left = self.emit(x.id, row)
        target = weight.type.domain
        there = row
        if row.domain != target:
            there = self._follow(f"{row.domain}.{target}", row, block)
        w = self.emit(weight.id, there)
        shape = weight.type.shape
        self.widest = max(self.widest, _numel(padded(shape)))
        if op.kind == "linear":
            axis = len(x.type.shape) - 1
            grown = _extend(left, len(x.type.shape), len(shape))
            return f"tl.sum({_masked(f'({grown} * {w})', shape, [axis])}, {axis + 1})"
        batch = int(op.attrs[0])  # type: ignore[arg-type]
        rank_out = len(shape) - batch - 1
        grown = _insert(left, batch, rank_out)
        text = _masked(f"({grown} * {w})", shape, list(range(batch + 1, len(shape))))
        for axis in reversed(range(batch + 1, len(shape))):
            text = f"tl.sum({text}, {axis + 1})"
        return text


def _numel(shape: Shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _lane(axis: int, rank: int, size: int) -> str:
    """Indices along one axis of the row shape, in a tensor with a leading row axis."""
    index = ", ".join(":" if a == axis else "None" for a in range(rank))
    return f"tl.arange(0, {size})[None, {index}]"


def _trail(name: str, rank: int) -> str:
    """A per-row tensor beside tensors of `rank` more axes."""
    return name if rank == 0 else f"{name}[:, {', '.join(['None'] * rank)}]"


def _extend(name: str, have: int, rank: int) -> str:
    """Add axes on the right: operands are aligned from the left."""
    if have == rank:
        return name
    index = ", ".join([*[":"] * (have + 1), *["None"] * (rank - have)])
    return f"({name})[{index}]"


def _insert(name: str, batch: int, rank_out: int) -> str:
    """Add the input axis between the batch axes and the output axes."""
    index = ", ".join([*[":"] * (batch + 1), "None", *[":"] * rank_out])
    return f"({name})[{index}]"


def _masked(text: str, shape: Shape, axes: list[int]) -> str:
    """Zero the padding of the axes that are about to be summed."""
    masks = [
        f"({_lane(a, len(shape), padded(shape)[a])} < {shape[a]})"
        for a in axes
        if padded(shape)[a] != shape[a]
    ]
    return f"tl.where({' & '.join(masks)}, {text}, 0)" if masks else text


def _trivial_reshape(name: str, have: Shape, want: Shape) -> str:
    """Insert or drop axes of size 1; other reshapes are carried out on stored values."""
    if have == want:
        return name
    core = tuple(n for n in have if n != 1)
    assert core == tuple(n for n in want if n != 1), (have, want)
    text = f"({name})"
    for axis in reversed([a for a, n in enumerate(have) if n == 1]):
        text = f"tl.sum({text}, {axis + 1})"
    if len(core) == len(want):
        return text
    index = ", ".join([":", *["None" if n == 1 else ":" for n in want]])
    return f"{text}[{index}]"
