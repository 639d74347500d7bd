"""`dataeff rgnn`: what the compiler makes of a layer, and what its GPU kernels use."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dataeff.cli import UserError
from dataeff.cli.arguments import check_writable

if TYPE_CHECKING:
    from dataeff.nn.published import Published
    from dataeff.rgnn import Graph, Layer
    from dataeff.rgnn.build import StepReport
    from dataeff.rgnn.schedule import Choice

BACKENDS = ("auto", "reference", "cpp", "triton")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# The size that kernels are compiled for where no graph is given: rows of a graph of a million edges
# in the order of `Graph.sizes`; what the passes choose depends on it, the kernels' text does not.
NODES, EDGES, PAIRS, RELATIONS, NODE_TYPES = 100_000, 1_000_000, 400_000, 64, 4

command = typer.Typer(
    help="Look into the relational compiler.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@command.command()
def explain(
    file: Annotated[Path, typer.Argument(help="A Python file with a function example().")],
    backend: Annotated[
        str, typer.Option(help="Whose kernels: auto (this machine's), reference, cpp or triton.")
    ] = "auto",
) -> None:
    """Print every stage of a layer's compilation.

    The file's function example() returns (layer, graph, arguments): a tuple, or a dictionary.
    """
    if backend not in BACKENDS:
        raise UserError(f"--backend: {backend!r} is none of {', '.join(BACKENDS)}")
    from dataeff.rgnn.backend import choose

    try:
        choose("cpu")  # what DATAEFF_RGNN_BACKEND asks for, before example() runs anything
    except ValueError as error:
        raise UserError.of(error) from error
    layer, graph, arguments = load_example(file)
    args, kwargs = ((), arguments) if isinstance(arguments, Mapping) else (arguments, {})
    from dataeff.rgnn import LayerTypeError
    from dataeff.rgnn.explain import explain as text_of

    try:
        asked = None if backend == "auto" else backend
        typer.echo(text_of(layer, graph, tuple(args), dict(kwargs), asked))
    except LayerTypeError as error:
        raise UserError.of(error) from error


@command.command()
def build(
    layer: Annotated[
        str, typer.Option(help="rgcn, rgat, hgt, simple_hgn, comp_gcn, or a file with example().")
    ],
    num_in: Annotated[int, typer.Option("--in", help="Features in.")] = 64,
    num_out: Annotated[int, typer.Option("--out", help="Features out, all heads together.")] = 64,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 1,
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, ...; these three by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    tf32: Annotated[bool, typer.Option("--tf32", help="float32 products in TF32.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the reports to this file.")] = None,
) -> None:
    """Compile a layer's GPU kernels, forward and backward; show registers and spills.

    Needs no GPU. Exits with 1 when a kernel spills registers or takes more
    shared memory than the target has. Tiles, warps and stages are what
    rgnn.tune chose where a file's example() calls it, and the cost model's
    otherwise.
    """
    import torch

    from dataeff.rgnn.aot import capability_of
    from dataeff.rgnn.build import TARGETS, layer_reports

    if dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} is none of {', '.join(DTYPES)}")
    for one in target or ():
        try:
            capability_of(one)
        except ValueError as error:
            raise UserError(f"--target: {error}") from error
    check_writable("--json", json)
    published, sizes, shapes, choice = _what_to_build(layer, num_in, num_out, heads)
    reports: list[StepReport] = []
    for one in target or TARGETS:
        try:
            reports += layer_reports(
                published.layer,
                shapes,
                sizes,
                published.statics(heads),
                dtype=getattr(torch, dtype),
                target=one,
                precision="tf32" if tf32 else "ieee",
                typed=published.typed,
                choice=choice,
            )
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"{layer} for {one}: {error}") from error
    _print(reports)
    if json is not None:
        size = {"in": num_in, "out": num_out, "heads": heads, "shapes": shapes}
        _write(json, {"layer": layer, "dtype": dtype, "tf32": tf32, **size}, reports)
    if not all(report.kernel.fits for report in reports):
        raise typer.Exit(1)


def load_example(path: Path) -> tuple[Layer, Graph, Any]:
    """What the function `example` of a Python file returns."""
    from dataeff.rgnn import Graph, Layer

    if not path.is_file():
        raise UserError(f"{path} is not a file")
    spec = importlib.util.spec_from_file_location(f"dataeff_example_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that its classes and functions can be found again
    spec.loader.exec_module(module)
    example = getattr(module, "example", None)
    found = example() if callable(example) else None
    wanted = isinstance(found, tuple) and len(found) == 3
    if not wanted or not isinstance(found[0], Layer) or not isinstance(found[1], Graph):  # type: ignore[index]
        raise UserError(
            f"{path} needs a function example() that returns (layer, rgnn.Graph, arguments)"
        )
    return found  # type: ignore[return-value]


_Shapes = dict[str, tuple[int, ...]]


def _what_to_build(
    name: str, num_in: int, num_out: int, heads: int
) -> tuple[Published, tuple[int, ...], _Shapes, Choice | None]:
    """The layer, the rows of each domain, the shapes of its arguments, and what was tuned."""
    from dataeff.nn.published import PUBLISHED, Published

    if name.endswith(".py"):
        layer, graph, arguments = load_example(Path(name))
        args, kwargs = ((), arguments) if isinstance(arguments, Mapping) else (arguments, {})
        tensors, statics = layer.bind(graph, tuple(args), dict(kwargs))
        shapes = {n: tuple(t.shape) for n, t in tensors.items()}
        typed = graph.layout is not None
        choice = layer.choice_for(graph, list(tensors.values()))
        published = Published(layer, lambda *_: shapes, lambda _: dict(statics), typed)
        return published, graph.sizes, shapes, choice
    if name not in PUBLISHED:
        raise UserError(f"--layer: {name!r} is none of {', '.join(PUBLISHED)}, nor a Python file")
    if min(num_in, num_out, heads) < 1 or num_out % heads:
        raise UserError(
            f"--in {num_in}, --out {num_out} and --heads {heads} must be positive, and the heads"
            " divide the features out"
        )
    found = PUBLISHED[name]
    shapes = found.shapes(NODES, NODE_TYPES, RELATIONS, num_in, heads, num_out // heads)
    return found, (NODES, NODES, EDGES, PAIRS, PAIRS, RELATIONS, NODE_TYPES), shapes, None


def _print(reports: list[StepReport]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    figures = "registers", "shared bytes", "spilled bytes"
    for title in ("target", "direction", "kernel", "schedule", *figures):
        numeric = title in figures
        table.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for report in reports:
        kernel = report.kernel
        schedule = ", ".join(f"{name} {value}" for name, value in report.schedule.items())
        used = map(str, (kernel.registers, kernel.shared_bytes, kernel.spill_bytes))
        table.add_row(kernel.target, report.direction, report.work, schedule, *used)
    console = Console()
    if not console.is_terminal:  # a pipe or a log file has no width to fold at
        console = Console(width=200)
    console.print(table)
    bad = sum(not report.kernel.fits for report in reports)
    console.print(f"{len(reports)} kernels, {bad} spill or do not fit")


def _write(path: Path, what: dict[str, Any], reports: list[StepReport]) -> None:
    import json

    import torch
    import triton

    kernels = [
        {
            "direction": report.direction,
            "work": report.work,
            "schedule": report.schedule,
            **asdict(report.kernel),
            "fits": report.kernel.fits,
        }
        for report in reports
    ]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    path.write_text(json.dumps({**what, **versions, "kernels": kernels}, indent=2) + "\n")
