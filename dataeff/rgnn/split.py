"""Cut a joint program into what forward runs and what backward runs.

A forward value that backward reads is kept if computing it again would cost a reduction: the sum
over segments, or the inner product that gives an edge its score, a number that costs two rows to
compute. Elementwise values, gathers and wide products of what is at hand are computed again: one
more product costs a few hundredths of a step, and keeping rows of pairs through forward takes more
memory than all features and gradients. Weights of a softmax cost a pass over the edges to compute:
they are kept instead of its scores where backward has no other use for those, which are as many,
and beside them where they take no more memory than the layer's features and results.
"""

from __future__ import annotations

from dataclasses import dataclass

from dataeff.rgnn.domains import TYPE_DOMAINS
from dataeff.rgnn.ir import Builder, Op, Program
from dataeff.rgnn.lower import SMALL_PRODUCT
from dataeff.rgnn.passes.dce import eliminate_dead_code

HEAVY = ("linear_t", "outer", "einsum", "sum", "max", "top", "logsum")


# Of so many first outputs bits say whether backward reads them; it is given all others.
NUM_TOLD = 62


@dataclass(frozen=True)
class Halves:
    """Forward and backward programs.

    `forward` returns the layer's outputs, then the values named `saved:k` among the inputs of
    `backward`, which reads the outputs themselves as `output:k`.
    """

    forward: Program
    backward: Program | None
    num_outputs: int


def output_input(output: int) -> str:
    """The name by which backward reads an output of forward."""
    return f"output:{output}"


def split(
    joint: Program, num_outputs: int, rows: dict[str, int], *, weights: bool = True
) -> Halves:
    """Split a joint program whose first `num_outputs` results are the layer's outputs.

    Args:
        joint: forward, then what differentiation appended.
        num_outputs: results of forward.
        rows: rows of each domain.
        weights: keep those of a softmax where they are few. A backend that computes scores again
            in each pass over a node's edges gains nothing by it.
    """
    outputs, results = joint.outputs[:num_outputs], joint.outputs[num_outputs:]
    if len(joint.outputs) == num_outputs:
        return Halves(eliminate_dead_code(joint), None, num_outputs)
    forward = _ancestors(joint, outputs)
    values = _read_by_backward(joint, forward, results)
    if weights:
        others = _read_by_backward(joint, forward, results, weights=True)
        wide = _elements_of_edges(joint, others)
        features = _elements_of_nodes(joint, (*(i.id for i in joint.inputs), *outputs), rows)
        if wide <= _elements_of_edges(joint, values) or wide * rows["edge"] <= features:
            values = others
    kept: dict[int, str] = {}
    for value in values:
        if value in outputs:
            kept[value] = output_input(outputs.index(value))
        else:
            kept[value] = f"saved:{sum(n.startswith('saved') for n in kept.values())}"
    saved = [v for v, name in kept.items() if name.startswith("saved")]
    whole = Program(joint.ops, (*outputs, *saved))
    backward = eliminate_dead_code(_with_inputs(joint, kept, num_outputs))
    return Halves(eliminate_dead_code(whole), backward, num_outputs)


def _ancestors(program: Program, roots: tuple[int, ...]) -> set[int]:
    found: set[int] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack.extend(program[value].args)
    return found


def _read_by_backward(
    joint: Program, forward: set[int], roots: tuple[int, ...], *, weights: bool = False
) -> list[int]:
    """Forward values to keep, in order; `weights`: those of a softmax among them."""
    kept: set[int] = set()
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if joint[value].kind == "equal":
            kept |= _compared(joint, forward, joint[value].args)
        if value in kept:
            continue
        softmax = weights and _is_softmax(joint, joint[value])
        if value in forward and (softmax or _keeps(joint, joint[value])):
            kept.add(value)
        else:
            stack.extend(joint[value].args)
    return sorted(kept)


def _keeps(joint: Program, op: Op) -> bool:
    """Whether a forward value that backward reads is kept."""
    if op.kind == "linear":
        return op.type.numel <= SMALL_PRODUCT or op.type.domain in TYPE_DOMAINS
    if op.kind == "reduce":
        rows = joint[op.args[0]].type
        return rows.domain == "edge" and op.type.numel <= SMALL_PRODUCT < rows.numel
    return op.kind in HEAVY


def _is_softmax(joint: Program, op: Op) -> bool:
    """Whether a value is `exp(score - top - logsum)`, as `edge_softmax` makes it."""
    shifted = joint[op.args[0]] if op.kind == "exp" and op.type.domain == "edge" else op
    part = joint[shifted.args[1]] if shifted.kind == "sub" else op
    return part.kind == "gather" and joint[part.args[0]].kind == "logsum"


def _elements_of_edges(joint: Program, values: list[int]) -> int:
    """Elements that these values have for each edge."""
    return sum(joint[v].type.numel for v in values if joint[v].type.domain == "edge")


def _elements_of_nodes(joint: Program, values: tuple[int, ...], rows: dict[str, int]) -> int:
    """Elements of those of these values that stand on nodes."""
    kinds = [joint[v].type for v in values]
    return sum(rows[k.domain] * k.numel for k in kinds if k.domain in ("node", "dst"))


def _compared(joint: Program, forward: set[int], args: tuple[int, ...]) -> set[int]:
    """What a maximum was taken of: computed anew it may differ in a last bit."""
    found = set()
    for value in args:
        while joint[value].kind == "gather":
            value = joint[value].args[0]
        if value in forward and joint[value].kind != "input":
            found.add(value)
    return found


def _with_inputs(joint: Program, kept: dict[int, str], num_outputs: int) -> Program:
    """The backward half: kept values become inputs."""
    builder = Builder()
    new: list[int] = []
    for op in joint.ops:
        if op.id in kept:
            new.append(builder.emit("input", attrs=(kept[op.id],), type=op.type, line=op.line))
        else:
            new.append(builder.copy(op, tuple(new[a] for a in op.args)))
    return builder.program(new[o] for o in joint.outputs[num_outputs:])
