"""The ROK curve: recompute, offload, keep, and the planner's mixes between them.

Peak memory for backward against throughput, at several batch sizes (SSDTrain, arXiv 2408.10013,
section 4.3). The memory is the device's peak on a GPU, and on a CPU `peak_saved_bytes`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dataeff.bench.case import Case, Options, Provider
from dataeff.bench.offload.model import Shape
from dataeff.bench.offload.planned import SHARES
from dataeff.bench.offload.planned import provider as planned
from dataeff.bench.offload.training import disk, keep, make_inputs, recompute
from dataeff.bench.record import Record
from dataeff.bench.tables import by_provider

MARKERS = "os^Dvp*"


def cases(options: Options) -> Iterator[Case]:
    """One case per batch size. On two idle cores of a server: seven minutes."""
    layers, width, tokens = options.pick(full=(6, 256, 128), quick=(4, 256, 64))
    for batch in options.pick(full=(2, 4, 8, 16), quick=(2, 4)):
        shape = Shape(layers, width, batch, tokens)
        yield Case(
            size=f"rok: {shape}",
            group="recompute, offload, keep",
            inputs=partial(make_inputs, shape, options),
            budget_s=6.0,
            providers=(
                Provider("keep", keep),
                Provider("torch checkpoint", recompute),
                Provider("dataeff disk", disk, role="ours"),
                *(planned(share) for share in options.pick(full=SHARES, quick=SHARES[1:2])),
            ),
        )


def curve(records: Sequence[Record]) -> dict[str, list[tuple[float, float, int]]]:
    """By provider: (bytes held at the peak, tokens per second, batch), by growing batch.

    Raises ValueError when no provider has both a time and a peak.
    """
    points: defaultdict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for size, providers in by_provider(records).items():
        batch, tokens = (_number(name, size) for name in ("batch", "tokens"))
        for name, metrics in providers.items():
            peak = metrics.get("peak_device_bytes", metrics.get("peak_saved_bytes"))
            taken = metrics.get("time_s")
            if peak is not None and peak.value is not None and taken is not None and taken.value:
                points[name].append((peak.value, batch * tokens / taken.value, batch))
    if not points:
        raise ValueError("nothing to plot: no provider has a time and a peak")
    return {name: sorted(found, key=lambda point: point[2]) for name, found in points.items()}


def _number(name: str, size: str) -> int:
    found = re.search(rf"\b{name}=(\d+)", size)
    if found is None:
        raise ValueError(f"the size {size!r} names no {name}")
    return int(found[1])


def plot(records: Sequence[Record], path: str | Path) -> None:
    """Draws the curve to `path`: a line per provider, a point per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lines = curve(records)
    figure, axis = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for marker, (name, points) in zip(MARKERS, lines.items(), strict=False):
        mib = [peak / 2**20 for peak, _, _ in points]
        axis.plot(mib, [rate for _, rate, _ in points], marker=marker, label=name)
        for (_, rate, batch), x in zip(points, mib, strict=True):
            axis.annotate(str(batch), (x, rate), textcoords="offset points", xytext=(4, 4))
    axis.set_xlabel("MiB held for backward at the peak")
    axis.set_ylabel("tokens per second")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda mib, _: f"{mib:g}"))
    axis.margins(x=0.08, y=0.1)
    axis.grid(alpha=0.3)
    axis.set_title(
        f"recompute, offload, keep on {records[0].device}\nat each point: the batch size"
    )
    figure.legend(loc="outside right upper")
    undated = {"Date": None} if Path(path).suffix == ".svg" else None
    try:
        with matplotlib.rc_context({"svg.hashsalt": "dataeff"}):  # the same records, the same file
            figure.savefig(path, metadata=undated)
    finally:
        pyplot.close(figure)
