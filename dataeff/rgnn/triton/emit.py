"""Writes the values of one traversal's rows as lines of Triton, each computed once in a loop body.

What is stored elsewhere is loaded, everything else is computed where it is read.
"""

from __future__ import annotations

from dataeff.rgnn import domains
from dataeff.rgnn.ir import Op
from dataeff.rgnn.kernels_ir import Schedule, Traversal
from dataeff.rgnn.phases import Pass, Phases
from dataeff.rgnn.triton import reductions, values
from dataeff.rgnn.triton.text import Block, Row, lane, padded, padded_numel, trail


class Emitter:
    """The lines of one kernel, and the arguments that all kernels of a traversal share.

    Args:
        schedule: the program and what of it is stored.
        number: the traversal's step.
        contiguous: maps whose segments are ranges of rows.
        double: sums are taken in float64.
    """

    def __init__(
        self, schedule: Schedule, number: int, contiguous: tuple[str, ...], double: bool
    ) -> None:
        kernel = schedule.steps[number]
        assert isinstance(kernel, Traversal)
        self.schedule, self.kernel = schedule, kernel
        self.program, self.stored = schedule.program, schedule.stored
        self.kept = schedule.kept(number)
        self.phases = Phases(schedule, kernel)
        self.center = Row(kernel.center, "i", "i_mask", "outer")
        self.number, self.name = number, f"k{number}"
        self.contiguous = contiguous
        self.type = "tl.float64" if double else "tl.float32"
        self.arguments: dict[tuple[str, int | str], str] = {}
        self.widest = 1
        self.clear()

    def clear(self) -> None:
        """Begin the body of another kernel."""
        self.outer, self.inner = Block("    "), Block("        ")
        self.counter = 0

    def argument(self, kind: str, what: int | str) -> str:
        """The name of an argument."""
        label = str(what).replace(".", "_")
        name = f"v{label}" if kind == "value" else f"{kind}_{label}"
        return self.arguments.setdefault((kind, what), name)

    def fresh(self, stem: str) -> str:
        """A variable's name."""
        self.counter += 1
        return f"{stem}{self.counter}"

    def function(
        self,
        name: str,
        first: str,
        head: list[str],
        sizes: tuple[int, int],
        kind: str = "",
        stages: int = 1,
        each: str = "",
    ) -> str:
        """The kernel of the lines so far.

        Args:
            name: of the function.
            first: its arguments before those that all share, each with a comma behind it.
            head: its first lines.
            sizes: center rows, and inner rows of each that it reads at a time.
            kind: says in its comment which rows it is for.
            stages: blocks of inner rows that are under way at a time.
            each: a loop that all lines are the body of.
        """
        lines = [*(f"    {line}" for line in head), *self.outer.lines]
        if each:
            lines = [f"    {each}", *(f"    {line}" for line in lines)]
        rows, block = sizes
        names = first + ", ".join([*self.arguments.values(), "rows"])
        along = f" along {self.kernel.map}" if self.kernel.map else ""
        text = "\n".join(
            [
                "",
                f"# traversal over {self.kernel.center}{along}{kind}",
                # How many rows there are changes with each sampled block: one program for all.
                '@triton.jit(do_not_specialize=["rows"])',
                f"def {name}({names}):",
                *lines,
                "",
            ]
        )
        # Left to itself, Triton pipelines loops of products alone.
        pipelined = f"tl.range(0, steps, BLOCK, num_stages={stages})"
        text = text.replace("INNER", pipelined if stages > 1 else "range(0, steps, BLOCK)")
        for size, number in (("LANES", rows * block), ("BLOCK", block), ("ROWS", rows)):
            text = text.replace(size, str(number))
        return text

    def bounds(self, name: str) -> list[str]:
        """Where the inner rows of each center row begin and end."""
        begin, end = self.argument("begin", name), self.argument("end", name)
        return [
            f"first = tl.load({begin} + i, mask=i_mask, other=0)",
            f"last = tl.load({end} + i, mask=i_mask, other=0)",
        ]

    def walk(self, step: Pass) -> None:
        """One loop over the inner rows, which leaves the accumulators of its reductions."""
        name = self.kernel.map
        assert name is not None
        self.inner = Block("        ")
        row = Row(domains.map_source(name), "e", "e_mask", "inner")
        sums = [self.program[v] for v in step.accumulated]
        for op in sums:
            reductions.start(op, self.outer, self.type)
        for op in sums:
            item = self.emit(op.args[0], row)
            reductions.accumulate(op, item, self.inner, self.type)
        for value in step.stores:
            self.store(self.inner, value, self.emit(value, row), row)
        self._loop(name)

    def finish(self, step: Pass) -> None:
        """Turn the accumulators of a pass into its reductions."""
        for value, logsum in step.tops.items():
            reductions.take_top(self.program[value], logsum, self.outer)
        for value in step.reductions:
            reductions.finish(self.program[value], self.outer)
            self.outer.known[value, self.center.name] = f"acc{value}"

    def _loop(self, name: str) -> None:
        out = self.outer
        out.add("for t in INNER:")
        out.add("    at = first[None, :] + (t + tl.arange(0, BLOCK))[:, None]")
        out.add("    e_mask = tl.reshape(at < last[None, :], [LANES])")
        out.add("    at = tl.reshape(at, [LANES])")
        if name in self.contiguous:
            out.add("    e = at.to(tl.int64)")
        else:
            items = self.argument("items", name)
            out.add(f"    e = tl.load({items} + at, mask=e_mask, other=0).to(tl.int64)")
        out.lines += self.inner.lines

    def store(self, block: Block, value: int, name: str, row: Row) -> None:
        """Put a value at a row into memory, if anything reads it there."""
        if value not in self.kept:
            return
        where, mask = self._address(self.argument("value", value), self.program[value], row)
        block.add(f"tl.store({where}, {name}, mask={mask})")

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
        return values.elementwise(op, names, shapes, self.type)

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
        return values.product(op, left, x.type.shape, w, weight.type.shape)
