"""`dataeff plan`: what an offload would need, before a GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dataeff.cli import UserError

if TYPE_CHECKING:
    from dataeff.offload.capacity import CapacityPlan, Disks

GB = 1e9
TB = 1e12

# Options that take positive numbers.
_OF_A_MODEL = (
    "gpus", "tensor_parallel", "microbatch", "sequence", "gpu_memory_gb", "gpu_tflops",
    "utilization",
)  # fmt: skip
_OF_DISKS = ("disks", "write_gbs", "read_gbs", "disk_tb", "endurance_tb")


def command(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="A model by name; an unknown one lists them.")
    ] = None,
    from_report: Annotated[
        Path | None,
        typer.Option(help="A report saved by `offload.report().save(FILE)`, instead of a model."),
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the job, which shard weights and states.")] = 8,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs that share one microbatch.")] = 1,
    microbatch: Annotated[int, typer.Option(help="Sequences per forward and backward.")] = 1,
    sequence: Annotated[int, typer.Option(help="Tokens per sequence.")] = 8192,
    only_layer_inputs: Annotated[
        bool, typer.Option("--only-layer-inputs", help="Recompute blocks, offload their inputs.")
    ] = False,
    gpu_memory_gb: Annotated[float, typer.Option(help="Memory of one GPU.")] = 80.0,
    gpu_tflops: Annotated[float, typer.Option(help="Dense bf16 rate of one GPU.")] = 989.0,
    utilization: Annotated[float, typer.Option(help="Share of that rate a step reaches.")] = 0.4,
    disks: Annotated[int, typer.Option(help="Disks of one GPU.")] = 4,
    write_gbs: Annotated[float, typer.Option(help="Sustained writes of one disk, GB/s.")] = 5.0,
    read_gbs: Annotated[float, typer.Option(help="Sustained reads of one disk, GB/s.")] = 6.5,
    disk_tb: Annotated[float, typer.Option(help="Size of one disk.")] = 1.0,
    endurance_tb: Annotated[float, typer.Option(help="Rated TB written of one disk.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Compute the bandwidth, memory and disk life that offloading a model's activations takes.

    `dataeff doctor` measures what the disks of this machine do.
    """
    from dataeff.offload.capacity import MODELS, Disks, Gpu, plan_capacity

    _check(context)
    disk = Disks(disks, endurance_tb * TB, write_gbs * GB, read_gbs * GB, disk_tb * TB)
    if from_report is not None:
        _show(f"what {from_report} measured", _from_report(from_report, disk), as_json)
        return
    assert model is not None
    try:
        plan = plan_capacity(
            MODELS[model],
            num_gpus=gpus,
            microbatch=microbatch,
            sequence=sequence,
            tensor_parallel=tensor_parallel,
            only_layer_inputs=only_layer_inputs,
            gpu=Gpu(gpu_memory_gb * GB, gpu_tflops * TB, utilization),
            disks=disk,
        )
    except (ValueError, OverflowError) as error:
        raise UserError.of(error) from error
    share = "1 GPU, a step" if gpus == 1 else f"{gpus} GPUs, one GPU's share of a step"
    _show(f"{model} on {share}", plan, as_json)


def _check(context: typer.Context) -> None:
    """Refuses what cannot be planned, by the name of the option."""
    from dataeff.offload.capacity import MODELS

    given = context.params
    model, measured = given["model"], given["from_report"] is not None
    if (model is not None) == measured:
        raise UserError("name either --model NAME or --from-report FILE")
    if not measured and model not in MODELS:
        raise UserError(f"--model: unknown model {model!r}: choose from {', '.join(MODELS)}")
    for name in (*_OF_A_MODEL, *_OF_DISKS):
        if not 0 < given[name] < float("inf"):
            raise UserError(f"{_option(name)}: {given[name]} is not a positive number")
    for name in (*_OF_A_MODEL, "only_layer_inputs") if measured else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"{_option(name)} is for --model: a report was measured on what it ran on; leave "
                "the option away"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _from_report(path: Path, disks: Disks) -> CapacityPlan:
    from dataeff.offload.capacity import plan_from_measurement
    from dataeff.offload.report import OffloadReport

    try:
        report = OffloadReport.load(path)
    except (OSError, ValueError) as error:
        raise UserError.of(error, "--from-report") from error
    if not report.num_steps or not report.step_s:
        raise UserError(f"--from-report: {path} holds no finished step")
    return plan_from_measurement(report.bytes_per_step, report.step_s, disks=disks)


def _show(title: str, plan: CapacityPlan, as_json: bool) -> None:
    if as_json:
        typer.echo(_as_json(plan))
    else:
        _print(title, plan)


def _as_json(plan: CapacityPlan) -> str:
    import json
    import math
    from dataclasses import asdict

    # JSON has no infinity: a disk that nothing is written to has no end of life.
    figures = {k: v if math.isfinite(v) else None for k, v in asdict(plan).items()}
    return json.dumps({**figures, "verdict": plan.verdict}, indent=2)


def _print(title: str, plan: CapacityPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None)
    amounts = {
        "activations saved for backward": f"{plan.activations / GB:.1f} GB",
        "of head and loss, which stay": f"{plan.kept / GB:.1f} GB",
        "weights, gradients, optimizer states": f"{plan.states / GB:.1f} GB",
        "memory of the GPU": f"{plan.memory / GB:.1f} GB",
        "of the activations, what does not fit": f"{plan.excess / GB:.1f} GB",
    }
    if not plan.memory:  # measured: all that was offloaded
        amounts = {"offloaded per step": _digits(plan.excess / GB, "GB")}
    rates = {
        "step": _digits(plan.step_s, "s"),
        "writes must sustain": _digits(plan.write_bandwidth / GB, "GB/s"),
        "the disks sustain": _digits(plan.disk_bandwidth / GB, "GB/s"),
        "written per day": _digits(plan.written_per_day / TB, "TB"),
        "disk life as rated": _days(plan.rated_life_days),
        "disk life if only large writes and a day's retention count": _days(plan.relaxed_life_days),
    }
    for name, value in (amounts | rates).items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(f"\n{plan.verdict}")


def _digits(amount: float, unit: str) -> str:
    """Three digits, or all before the point: not 3.57e+03."""
    return f"{amount:,.0f} {unit}" if 1000 <= amount < 1e6 else f"{amount:.3g} {unit}"


def _days(days: float) -> str:
    if days == float("inf"):
        return "not worn"
    return f"{days:.1f} days" if days < 730 else f"{days / 365:.1f} years"
