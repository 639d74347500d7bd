"""`dataeff demo`: the main job on real input."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from dataeff.cli import UserError
from dataeff.cli.arguments import Device, torch_device


def command(
    report_dir: Annotated[
        Path, typer.Option(help="Where report.json and report.html go; made when missing.")
    ] = Path("demo-report"),
    scale: Annotated[
        float, typer.Option(help="Share of the source files in the graph, above 0, up to 1.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    spill: Annotated[
        Path | None,
        typer.Option(help="Directory for activations; a temporary one in the report's by default."),
    ] = None,
    device: Device = None,
    max_seconds: Annotated[
        float, typer.Option(help="Training that takes longer is cut short, and the report says so.")
    ] = 480.0,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Sizes of seconds instead of minutes.")
    ] = False,
) -> None:
    """Train a relational GNN on the installed Python and a GPT on its sources; show what moved."""
    if find_spec("matplotlib") is None:
        raise UserError("the demo's report needs matplotlib: pip install 'dataeff[demo]'")
    if not 0 < scale <= 1:
        raise UserError(f"--scale: {scale} is not above 0 and at most 1")
    if not max_seconds > 0:
        raise UserError(f"--max-seconds: {max_seconds} is not positive")
    if spill is not None and not spill.is_dir():
        raise UserError(f"--spill: {spill} is not a directory")
    from dataeff.demo import SpillError, run_demo

    try:
        run_demo(
            report_dir=report_dir,
            scale=scale,
            seed=seed,
            spill=spill,
            device=torch_device(device),
            max_seconds=max_seconds,
            tiny=tiny,
        )
    except SpillError as error:
        raise UserError(str(error)) from error
