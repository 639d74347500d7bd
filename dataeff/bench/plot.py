"""One figure per workload: the median time of every provider at every size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dataeff.bench.record import Record
from dataeff.bench.tables import by_provider

COLORS = {"ours": "#1f77b4", "peer": "#b0b0b0", "ceiling": "#e8c060"}


def plot(records: Sequence[Record], path: str | Path) -> None:
    """Writes a bar chart of `time_s` to `path`; its suffix picks the format (png, svg, pdf).

    Raises:
        ValueError: nothing was timed, or matplotlib does not know the suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = by_provider(record for record in records if record.metric == "time_s")
    if not timed:
        raise ValueError("nothing to plot: no provider was timed")
    height = 0.6 * len(timed) + 0.28 * sum(len(providers) for providers in timed.values())
    figure, panels = pyplot.subplots(
        len(timed), 1, figsize=(9, max(height, 2.0)), squeeze=False, layout="constrained"
    )
    for axis, (size, providers) in zip(panels[:, 0], timed.items(), strict=True):
        rows = [row["time_s"] for row in providers.values()]
        values_ms = [1e3 * (row.value or 0.0) for row in rows]
        bars = axis.barh(
            [row.provider for row in rows], values_ms, color=[COLORS[row.role] for row in rows]
        )
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(size, fontsize=9, loc="left")
    panels[-1, 0].set_xlabel("milliseconds per call (median)")
    figure.suptitle(f"{records[0].workload} on {records[0].device}")
    try:
        figure.savefig(path)
    finally:
        pyplot.close(figure)
