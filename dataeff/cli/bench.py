"""`dataeff bench`: ours beside its peers on this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dataeff.bench import Options, workloads, write
from dataeff.cli import UserError
from dataeff.cli.arguments import Device, check_writable, existing_directory, torch_device

if TYPE_CHECKING:
    from dataeff.bench import Record

NAMES = (*workloads(), "all")


def command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")],
    json: Annotated[Path | None, typer.Option(help="Write the records to this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw them to this file (.png, .svg, .pdf).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few rounds.")] = False,
    only: Annotated[
        str, typer.Option("--only", help="Run the cases whose size holds this text.")
    ] = "",
    rok: Annotated[
        bool,
        typer.Option("--rok", help="Of offload: peak memory against throughput, by batch size."),
    ] = False,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where files go; the temporary directory by default."),
    ] = None,
    device: Device = None,
) -> None:
    """Time one workload against its peers and this machine's ceilings."""
    if name not in NAMES:
        raise UserError(f"unknown benchmark {name!r}: choose from {', '.join(NAMES)}")
    if rok and name != "offload":
        raise UserError(f"--rok: it is a curve of the benchmark offload, not of {name}")
    known = {"offload": _rok} if rok else workloads()
    chosen = list(known) if name == "all" else [name]
    options = Options(
        quick=quick,
        device=torch_device(device),
        directory=existing_directory("--dir", directory),
        only=only,
    )
    plots = _plot_paths(plot, chosen)
    for option, path in (("--json", json), *(("--plot", path) for path in plots.values())):
        check_writable(option, path)
    records: list[Record] = []

    def keep(found: list[Record]) -> None:
        if json is not None:
            write(records + found, json)

    for one in chosen:
        found = known[one](options, _say, keep)
        if not found:
            raise UserError(f"--only: no case of {one} holds {only!r} in its size")
        _show(one, found)
        if one in plots:
            _draw(found, plots[one], rok)
        records += found


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _plot_paths(plot: Path | None, chosen: list[str]) -> dict[str, Path]:
    """One file per workload: as named for one, with the workload's name added for several."""
    if plot is None:
        return {}
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot: {plot} ends in none of .png, .svg, .pdf")
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'dataeff[report]'")
    if len(chosen) == 1:
        return {chosen[0]: plot}
    return {one: plot.with_name(f"{plot.stem}-{one}{plot.suffix}") for one in chosen}


def _show(workload: str, records: list[Record]) -> None:
    from rich.console import Console

    from dataeff.bench.tables import terminal_table

    console = Console()
    if not console.is_terminal:  # a pipe or a log file has no width to fold at
        console = Console(width=200)
    console.print(terminal_table(workload, records))


def _rok(
    options: Options, say: Callable[[str], None], keep: Callable[[list[Record]], None]
) -> list[Record]:
    from dataeff.bench import cases
    from dataeff.bench.runner import run_workload

    return run_workload("offload", cases("offload.rok", options), options, say, keep)


def _draw(records: list[Record], path: Path, rok: bool) -> None:
    if rok:
        from dataeff.bench.offload.rok import plot
    else:
        from dataeff.bench.plot import plot

    plot(records, path)
