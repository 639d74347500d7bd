"""Text form of the inter-operator IR; `parse(render(p)) == p`.

%3 = leaky_relu[0.2](%2) : edge[4]
return %3
"""

from __future__ import annotations

import re
from ast import literal_eval

from dataeff.rgnn.ir import Attr, Builder, Op, Program, Type

_LINE = re.compile(
    r"%(?P<id>\d+) = (?P<kind>\w+)(?:\[(?P<attrs>.*?)\])?\((?P<args>[%\d, ]*)\)"
    r" : (?P<domain>\w+)\[(?P<shape>[\dx]*)\]"
)


def _render_attr(attr: Attr) -> str:
    return "x".join(map(str, attr)) or "()" if isinstance(attr, tuple) else str(attr)


def _parse_attr(text: str) -> Attr:
    if text == "()":
        return ()
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(map(int, text.split("x")))
    try:
        return float(literal_eval(text))
    except (ValueError, SyntaxError):
        return float(text) if text in ("inf", "-inf", "nan") else text


def _parse_attrs(kind: str, text: str) -> list[Attr]:
    if kind == "input":  # a name may look like a number
        return [text]
    attrs = [_parse_attr(a) for a in text.split(", ") if a]
    if kind == "const":
        return [float(a) if isinstance(a, int) else a for a in attrs]
    if kind in ("reduce", "expand", "reshape"):
        return [(a,) if isinstance(a, int) else a for a in attrs]
    return attrs


def render_op(op: Op) -> str:
    """One line of text."""
    attrs = f"[{', '.join(map(_render_attr, op.attrs))}]" if op.attrs else ""
    args = ", ".join(f"%{a}" for a in op.args)
    return f"%{op.id} = {op.kind}{attrs}({args}) : {op.type}"


def render(program: Program) -> str:
    """The whole program, one operation a line, then what it returns."""
    lines = [render_op(op) for op in program.ops]
    lines.append("return " + ", ".join(f"%{o}" for o in program.outputs))
    return "\n".join(lines) + "\n"


def parse(text: str) -> Program:
    """Read a program back, inferring every type again.

    Raises:
        ValueError: a line does not parse, is out of order, or states another type than it has.
        IRTypeError: operands do not fit.
    """
    builder = Builder()
    for number, line in enumerate(text.strip().splitlines(), 1):
        if line.startswith("return "):
            return builder.program(int(o.strip("% ")) for o in line[7:].split(",") if o.strip())
        match = _LINE.fullmatch(line.strip())
        if match is None or int(match["id"]) != len(builder.ops):
            raise ValueError(f"line {number} is not the next operation: {line!r}")
        stated = Type(match["domain"], tuple(int(s) for s in match["shape"].split("x") if s))
        attrs = _parse_attrs(match["kind"], match["attrs"] or "")
        args = [int(a.strip("% ")) for a in match["args"].split(",") if a.strip()]
        if any(arg >= len(builder.ops) for arg in args):
            raise ValueError(f"line {number} reads a value that no earlier line defines: {line!r}")
        given = stated if match["kind"] in ("input", "const") else None
        made = builder.emit(match["kind"], *args, attrs=attrs, type=given)
        if builder[made].type != stated:
            raise ValueError(
                f"line {number} states {stated}, but the value is {builder[made].type}"
            )
    raise ValueError("the program returns nothing")
