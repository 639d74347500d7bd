"""The plots of the report, as inline SVG."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2733", "#667085", "#e4e7ec"
OURS, BASELINE, THIRD = "#0f766e", "#b45309", "#98a2b3"
_TRACK_COLOURS = {
    "compute": OURS,
    "store": "#3b6fb6",
    "load": "#7c3aed",
    "sample": "#3b6fb6",
    "blocks": "#7c9cc9",
    "wait": "#dc2626",
    "gather wait": "#dc2626",
}
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "dataeff",  # the same figures give the same page
}


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def accuracy_plot(gnn: dict[str, Any]) -> str:
    """Test accuracy of the three, and validation accuracy while training."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 3.1), layout="constrained")
        bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.25))
        names = ["majority class", "features-only MLP", "relational attention"]
        values = [gnn["majority_accuracy"], gnn["mlp_accuracy"], gnn["test_accuracy"]]
        drawn = bars.barh(names, values, color=[THIRD, BASELINE, OURS], height=0.62)
        bars.bar_label(drawn, [f"{v:.1%}" for v in values], padding=4, color=INK)
        bars.set(xlim=(0, max(values) * 1.2), title="Accuracy on files never seen in training")
        bars.grid(axis="y", visible=False)
        bars.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
        for curve, name, colour in (
            (gnn["curve"], "relational attention", OURS),
            (gnn["mlp_curve"], "features-only MLP", BASELINE),
        ):
            curves.plot(
                curve["val_step"], curve["val_accuracy"], "o-", color=colour, label=name, ms=4
            )
        curves.set(title="Validation accuracy", xlabel="step", xlim=(0, None), ylim=(0, None))
        curves.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
        curves.legend(loc="lower right")
        return _svg(figure)


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving average, corrected for its start."""
    keep = 0.9
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    return smooth


def loss_plot(gnn: dict[str, Any], lm: dict[str, Any]) -> str:
    """Training losses of both parts."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        graph, text = figure.subplots(1, 2)
        for curve, name, colour in (
            (gnn["curve"], "relational attention", OURS),
            (gnn["mlp_curve"], "features-only MLP", BASELINE),
        ):
            steps = range(1, len(curve["loss"]) + 1)
            graph.plot(steps, curve["loss"], color=colour, alpha=0.25, lw=0.8)
            graph.plot(steps, _smooth(curve["loss"]), color=colour, label=name)
        graph.set(title="Graph: training loss", xlabel="step", ylim=(0, None))
        graph.legend()
        steps = range(1, len(lm["losses_keep"]) + 1)
        text.plot(steps, lm["losses_keep"], color=BASELINE, lw=5, alpha=0.35, label="keep")
        text.plot(steps, lm["losses_offload"], color=OURS, lw=1.4, label="offload to disk")
        text.set(title="Language model: training loss, both arms", xlabel="step")
        text.legend()
        return _svg(figure)


def bytes_plot(gnn: dict[str, Any], lm: dict[str, Any]) -> str:
    """Where the bytes were: held in memory for backward, and moved between tiers."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 2.7), layout="constrained")
        held, moved = figure.subplots(1, 2)
        mib = 2.0**20
        values = [lm["peak_saved_bytes_keep"] / mib, lm["peak_saved_bytes_offload"] / mib]
        drawn = held.barh(["keep", "offload"], values, color=[BASELINE, OURS], height=0.55)
        held.invert_yaxis()
        held.bar_label(drawn, [f"{v:,.1f} MiB" for v in values], padding=4, color=INK)
        held.set(title="Peak of saved activations in memory", xlim=(0, max(values) * 1.35))
        ways = {f"features {way}": n for way, n in gnn["bytes_gathered"].items()}
        ways |= {
            "activations memory->disk": lm["bytes_written"],
            "activations disk->memory": lm["bytes_read"],
            "activations forwarded": lm["bytes_forwarded"],
        }
        names, sizes = list(ways)[::-1], [n / mib for n in list(ways.values())[::-1]]
        drawn = moved.barh(names, sizes, color="#3b6fb6", height=0.55)
        moved.bar_label(drawn, [f"{v:,.0f} MiB" for v in sizes], padding=4, color=INK)
        moved.set(title="Bytes moved, by way", xlim=(0, max([*sizes, 1]) * 1.35))
        for axes in (held, moved):
            axes.grid(axis="y", visible=False)
            axes.set_xlabel("MiB")
        return _svg(figure)


def timeline_plot(spans: list[dict[str, Any]], title: str) -> str:
    """Spans as bars, one row per track; the empty string when there are none."""
    if not spans:
        return ""
    tracks = list(dict.fromkeys(span["track"] for span in spans))
    tracks.sort(key=lambda track: track != "compute")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 0.9 + 0.42 * len(tracks)), layout="constrained")
        axes = figure.subplots()
        for row, track in enumerate(tracks):
            mine = [s for s in spans if s["track"] == track]
            pieces = [(s["start_ms"], s["end_ms"] - s["start_ms"]) for s in mine]
            colours = [_span_colour(s) for s in mine]
            axes.broken_barh(
                pieces, (row - 0.36, 0.72), facecolors=colours, edgecolors="white", linewidth=0.3
            )
        axes.set_yticks(range(len(tracks)), tracks)
        axes.set(title=title, xlabel="milliseconds", ylim=(len(tracks) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        _name_parts(axes, spans)
        return _svg(figure)


def _span_colour(span: dict[str, Any]) -> str:
    shade = {"backward": "#115e59", "optimizer": "#99c7c2"}.get(span["name"])
    return shade or _TRACK_COLOURS.get(span["track"], THIRD)


def _name_parts(axes: Any, spans: list[dict[str, Any]]) -> None:
    """Writes forward and backward into their bars, where they are wide enough."""
    whole = max(s["end_ms"] for s in spans)
    for span in spans:
        width = span["end_ms"] - span["start_ms"]
        if span["track"] == "compute" and width > 0.011 * len(span["name"]) * whole:
            axes.text(
                span["start_ms"] + width / 2,
                0,
                span["name"],
                ha="center",
                va="center",
                color="white",
                fontsize=9,
            )
