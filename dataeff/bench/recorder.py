"""What is recorded of a case: times, rates, shares of the ceilings, memory."""

from __future__ import annotations

import statistics

import torch

from dataeff.bench.case import Case, Provider
from dataeff.bench.lane import Lane, peak_device_bytes
from dataeff.bench.record import Record, Run

CALM_SHARE = 0.05


class Recorder:
    """Turns the lanes of one case into records."""

    def __init__(self, workload: str, case: Case, run: Run) -> None:
        self.workload, self.case, self.run = workload, case, run

    def _record(
        self, provider: Provider, metric: str, value: float | None, unit: str, note: str = ""
    ) -> Record:
        return self.run.record(
            workload=self.workload,
            provider=provider.name,
            role=provider.role,
            metric=metric,
            value=value,
            unit=unit,
            size=self.case.size,
            note=note,
            group=self.case.group,
        )

    def skipped(self, provider: Provider, reason: str) -> Record:
        """Why a provider was not timed."""
        return self._record(provider, "skipped", None, "1", reason)

    def measured(self, lane: Lane, ceilings: list[Lane]) -> list[Record]:
        """Time, spread, rates, shares of the ceilings, and what the step itself reports.

        A long peer is not asked for more: its figures may take another call.
        """
        figures = [
            ("time_s", lane.median_s, "s"),
            ("time_spread_s", lane.quartile_distance_s, "s"),
            ("time_min_s", min(lane.samples), "s"),
            ("num_rounds", float(len(lane.samples)), "1"),
        ]
        nbytes = self.case.nbytes if lane.step.nbytes is None else lane.step.nbytes
        flops = self.case.flops if lane.step.flops is None else lane.step.flops
        if lane.provider.role == "ceiling":  # a copy's operations or a product's bytes bound nobody
            nbytes, flops = lane.step.nbytes or 0, lane.step.flops or 0
        if nbytes:
            figures.append(("bandwidth_gbs", lane.rate(nbytes) / 1e9, "GB/s"))
        if flops:
            figures.append(("rate_gflops", lane.rate(flops) / 1e9, "GFLOP/s"))
        if lane.provider.role != "ceiling":
            figures += self._shares(lane, nbytes, flops, ceilings)
        if lane.step.metrics is not None and not (lane.long and lane.provider.role == "peer"):
            figures += [(name, value, unit) for name, (value, unit) in lane.step.metrics().items()]
        return [self._record(lane.provider, *figure) for figure in figures]

    def against(self, lane: Lane, first: Lane) -> list[Record]:
        """Median over rounds of the time as a multiple of the first provider's in that round.

        What slows a whole round, another program say, slows both and drops out. Rounds that one of
        them did not take part in do not count.
        """
        if lane is first or "ceiling" in (lane.provider.role, first.provider.role):
            return []
        pairs = zip(lane.samples, first.samples, strict=False)
        ratio = statistics.median(mine / its for mine, its in pairs if its > 0)
        return [self._record(lane.provider, "time_ratio", ratio, "1")]

    def disturbed(self, lane: Lane, elsewhere: float) -> list[Record]:
        """What other programs took of the processors meanwhile, where it is enough to mistrust."""
        if lane.provider.role != "ours" or elsewhere <= CALM_SHARE:
            return []
        return [self._record(lane.provider, "busy_elsewhere", elsewhere, "1")]

    @staticmethod
    def _shares(
        lane: Lane, nbytes: int, flops: int, ceilings: list[Lane]
    ) -> list[tuple[str, float, str]]:
        shares = []
        for ceiling in ceilings:
            for mine, bound in ((nbytes, ceiling.step.nbytes), (flops, ceiling.step.flops)):
                if mine and bound:
                    share = lane.rate(mine) / ceiling.rate(bound)
                    shares.append((f"share_of_{ceiling.provider.name}", share, "1"))
        copies = [c.rate(c.step.nbytes) for c in ceilings if c.step.nbytes]
        products = [c.rate(c.step.flops) for c in ceilings if c.step.flops]
        if lane.step.kernels and copies and products:
            bounds_s = [max(b / copies[0], f / products[0]) for b, f in lane.step.kernels]
            shares.append(("share_of_roofline", sum(bounds_s) / lane.median_s, "1"))
        return shares

    def peak(self, lane: Lane, device: torch.device) -> list[Record]:
        """Device memory that one call takes at its peak, beyond what was held before it."""
        if device.type != "cuda" or lane.provider.role == "ceiling":
            return []
        if lane.step.before is not None:
            lane.step.before()
        peak = peak_device_bytes(lane.step.call, device)
        return [self._record(lane.provider, "peak_device_bytes", float(peak), "bytes")]
