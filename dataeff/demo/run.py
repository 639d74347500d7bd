"""Runs both parts of the demo and writes the report."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dataeff.demo.console import Console, headline
from dataeff.demo.gnn import run_gnn
from dataeff.demo.lm import SpillError, check_spill, run_lm
from dataeff.demo.machine import describe_machine, describe_versions
from dataeff.demo.report import write_report
from dataeff.demo.settings import choose_settings


def run_demo(
    *,
    report_dir: str | os.PathLike[str] = "demo-report",
    scale: float = 1.0,
    seed: int = 0,
    spill: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    max_seconds: float = 480.0,
    tiny: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains a relational GNN on the installed Python and a GPT on its text; reports what moved.

    Args:
        report_dir: where `report.json` and `report.html` go; made when it is missing.
        scale: share of the source files in the graph, in (0, 1].
        seed: of everything random.
        spill: directory on the disk for activations; by default a temporary one in `report_dir`.
        device: where models run; the GPU when there is one, unless given.
        max_seconds: training that takes longer is cut short; the report says so.
        tiny: sizes of seconds instead of minutes.
        quiet: print nothing.

    Returns:
        Every figure: what report.json holds.

    Raises:
        ValueError: `scale` or `max_seconds` is out of range.
        dataeff.demo.SpillError: a directory cannot be written to, or its disk is full.
    """
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds}")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = choose_settings(where, scale=scale, tiny=tiny)
    # what is left after the graph is built, shared by the two parts
    graph = replace(settings.graph, max_seconds=min(settings.graph.max_seconds, max_seconds / 3))
    text = replace(settings.text, max_seconds=min(settings.text.max_seconds, max_seconds / 3))
    console = Console(quiet)
    directory = _writable(Path(report_dir))
    if spill is not None:
        check_spill(Path(spill))  # before minutes of the part that does not need it
    started = time.perf_counter()
    with _deterministic(where), _spill_directory(spill, directory) as spill_path:
        console.heading("Relational GNN, features in host memory")
        gnn = run_gnn(graph, where, seed, console)
        console.heading("Language model, activations on disk")
        lm = run_lm(text, where, seed, spill_path, console)
    report = {
        "gnn": gnn,
        "lm": lm,
        "machine": describe_machine(where),
        "versions": describe_versions(),
        "settings": {"scale": scale, "seed": seed, "tiny": tiny, "max_seconds": max_seconds},
        "total_s": time.perf_counter() - started,
        "finished": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    paths = write_report(report, directory)
    _print_results(console, report, paths)
    return report


def _print_results(console: Console, report: dict[str, Any], paths: tuple[Path, Path]) -> None:
    console.heading("Results")
    console.summary(headline(report))
    if report["lm"]["num_store_errors"]:
        console.print(
            f"[yellow]{report['lm']['num_store_errors']} writes to disk failed, and those tensors "
            "stayed in memory: is the disk full?[/]"
        )
    console.print("\nEvery figure, and a page for a browser:")
    console.paths(*paths)


def _writable(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise SpillError(
            f"cannot write the report to {directory}: {error.strerror}. Name another directory"
        ) from error
    return directory


@contextmanager
def _spill_directory(spill: str | os.PathLike[str] | None, report_dir: Path) -> Iterator[Path]:
    if spill is not None:
        yield Path(spill)
        return
    with tempfile.TemporaryDirectory(prefix=".spill-", dir=report_dir) as path:
        yield Path(path)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Makes CUDA kernels give the same bits each time; CPU kernels do so anyway."""
    if device.type != "cuda":
        yield
        return
    was_on = torch.are_deterministic_algorithms_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
