"""Writes what the demo found: `report.json` with every figure, `report.html` as one page."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

from dataeff.demo.console import headline, readable_bytes
from dataeff.demo.plots import accuracy_plot, bytes_plot, loss_plot, timeline_plot

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dataeff demo</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #f7f8fa; color: #1f2733;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 960px; margin: 0 auto; padding: 40px 20px 64px; }}
h1 {{ font-size: 30px; margin: 0 0 4px; letter-spacing: -0.01em; }}
h2 {{ font-size: 20px; margin: 44px 0 6px; }}
p {{ margin: 6px 0 14px; max-width: 72ch; }}
.lead {{ color: #667085; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 14px;
  margin: 26px 0; }}
.card, figure {{ background: #fff; border: 1px solid #e4e7ec; border-radius: 10px; }}
.card {{ padding: 16px 18px; }}
.card b {{ display: block; font-size: 28px; line-height: 1.2; color: #0f766e;
  font-variant-numeric: tabular-nums; }}
.card span {{ color: #667085; font-size: 14px; }}
figure {{ margin: 14px 0; padding: 14px; overflow-x: auto; }}
svg {{ width: 100%; height: auto; min-width: 560px; display: block; }}
.tables {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 14px; }}
table {{ width: 100%; border-collapse: collapse; background: #fff; font-size: 14px;
  border: 1px solid #e4e7ec; border-radius: 10px; }}
caption {{ text-align: left; font-weight: 600; padding: 8px 2px; }}
td {{ padding: 6px 12px; border-top: 1px solid #f0f2f5; vertical-align: top; }}
td:last-child {{ text-align: right; font-variant-numeric: tabular-nums; }}
</style>
</head>
<body><main>
<h1>dataeff demo</h1>
<p class="lead">{where}</p>
<div class="cards">{cards}</div>
<h2>Relational GNN, features in host memory</h2>
<p>{gnn_text}</p>
<figure>{accuracy}</figure>
<figure>{gnn_timeline}</figure>
<h2>Language model, activations on disk</h2>
<p>{lm_text}</p>
<figure>{bytes}</figure>
<figure>{lm_timeline}</figure>
<h2>Losses</h2>
<figure>{losses}</figure>
<h2>All figures</h2>
<div class="tables">{tables}</div>
</main></body>
</html>
"""


def write_report(report: dict[str, Any], directory: Path) -> tuple[Path, Path]:
    """Writes both files; each is complete or absent.

    Args:
        report: what `run_demo` found.
        directory: an existing directory.

    Returns:
        The paths of report.json and report.html.
    """
    paths = directory / "report.json", directory / "report.html"
    page = render_page(report)
    _write(paths[0], json.dumps(report, indent=2) + "\n")
    _write(paths[1], page)
    return paths


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def render_page(report: dict[str, Any]) -> str:
    """The page: no script, no link, nothing to fetch."""
    gnn, lm = report["gnn"], report["lm"]
    groups = [
        *headline(report),
        ("Machine", [(k, _cell(k, v)) for k, v in report["machine"].items()]),
        ("Versions", list(report["versions"].items())),
    ]
    return _PAGE.format(
        where=html.escape(_where(report)),
        cards="".join(_card(value, what) for value, what in _cards(gnn, lm)),
        gnn_text=html.escape(_gnn_text(gnn)),
        lm_text=html.escape(_lm_text(lm)),
        accuracy=accuracy_plot(gnn),
        bytes=bytes_plot(gnn, lm),
        losses=loss_plot(gnn, lm),
        gnn_timeline=timeline_plot(gnn["timeline"], "A few mini-batches: sampling beside compute"),
        lm_timeline=timeline_plot(lm["timeline"], "One training step: transfers beside compute"),
        tables="".join(_table(name, rows) for name, rows in groups),
    )


def _where(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    what = machine.get("gpu", f"{machine['processor']}, {machine['num_cores']} cores")
    return f"{what} · torch {versions['torch']} · {report['total_s']:.0f} s · {report['finished']}"


def _cards(gnn: dict[str, Any], lm: dict[str, Any]) -> list[tuple[str, str]]:
    identical = lm["weights_identical"] and lm["losses_identical"]
    return [
        (f"{gnn['test_accuracy']:.1%}", f"test accuracy; an MLP without the graph "
         f"{gnn['mlp_accuracy']:.1%}, majority class {gnn['majority_accuracy']:.1%}"),
        (f"{gnn['num_edges'] / 1e6:.2f} M", f"edges between {gnn['num_nodes']:,} nodes, "
         f"{gnn['num_relations']} relations"),
        (f"{lm['peak_saved_share']:.0%}", "of the saved activations stay in memory; the rest is on "
         "disk until backward needs it"),
        ("same bits" if identical else "DIFFERENT", "losses and final weights, offloaded or not"),
        (f"{lm['step_time_ratio']:.2f}×", "step time of offloading against keeping"),
    ]  # fmt: skip


def _card(value: str, what: str) -> str:
    return f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'


def _gnn_text(gnn: dict[str, Any]) -> str:
    moved = ", ".join(f"{readable_bytes(n)} {way}" for way, n in gnn["bytes_gathered"].items())
    early = " (a shortened cycle: the time was limited)" if gnn["stopped_early"] else ""
    return (
        f"The graph is the Python installed on this machine: {gnn['num_files']:,} files of the "
        f"standard library and torch, parsed in {gnn['build_s']:.0f} s. The task is to tell from "
        f"which of {gnn['num_classes']} packages a function comes; whole files are held out, and "
        "package names are masked in every feature. Two layers of relational attention were "
        f"trained for {gnn['num_epochs']:.1f} epochs in {gnn['train_s']:.0f} s{early} on sampled "
        f"neighbourhoods; {gnn['rows_gathered']:,} feature rows were gathered from host memory "
        f"({moved})."
    )


def _lm_text(lm: dict[str, Any]) -> str:
    return (
        f"A byte-level GPT of {lm['num_parameters'] / 1e6:.1f} M parameters was trained twice on "
        f"the standard library's sources for {lm['num_steps']} steps, in turn: once keeping what "
        "backward needs in memory, once writing it to disk during forward and reading it back in "
        f"time. {readable_bytes(lm['bytes_written'])} were written and "
        f"{readable_bytes(lm['bytes_read'])} read; compute stood still for them for "
        f"{lm['exposed_wait_s']:.2f} s in all."
    )


def _cell(name: str, value: Any) -> str:
    return readable_bytes(value) if name.endswith("_bytes") else str(value)


def _table(name: str, rows: list[tuple[str, str]]) -> str:
    body = "".join(
        f"<tr><td>{html.escape(what)}</td><td>{html.escape(value)}</td></tr>"
        for what, value in rows
    )
    return f"<table><caption>{html.escape(name)}</caption>{body}</table>"
