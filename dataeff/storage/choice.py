"""Which engine moves bytes fastest here: a short measurement instead of a belief."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dataeff.storage.bandwidth import Probe, probe
from dataeff.storage.cufile import cufile_refusal
from dataeff.storage.engine import uring_refusal

DEFAULT = "threads"
MARGIN = 1.1  # another engine must be this much faster than the default to be taken
NUM_ROUNDS = 2


@dataclass(frozen=True)
class Choice:
    """What was measured, and what follows.

    Attributes:
        kind: the engine to open, as `open_engine` takes it.
        probes: by engine, the best of its rounds.
        refusals: by engine, why it cannot be used here.
        reason: why `kind` was taken, one sentence.
    """

    kind: str
    probes: dict[str, Probe]
    refusals: dict[str, str]
    reason: str


def choose_engine(
    directory: str | os.PathLike[str],
    *,
    nbytes: int = 64 << 20,
    max_seconds: float = 0.1,
    num_threads: int = 4,
    device: torch.device | str = "cpu",
) -> Choice:
    """Measures the engines that work here, in turn, and takes the fastest.

    An activation is written once and read once, so what counts is the time of both:
    `1 / write_gbs + 1 / read_gbs`, of an engine's best round. The threads are taken unless another
    engine is 1.1 times as fast: less than that is noise.

    Args:
        directory: on the disk in question.
        nbytes: size of the file.
        max_seconds: of writing, and of reading, per engine and round.
        num_threads: of the engines `threads` and `cufile`.
        device: whose memory is to be moved. That of a GPU is moved by cuFile, where it works; the
            others move host memory, and copies between that and the GPU go on beside them.

    Raises:
        OSError: the directory is missing, not writable, full.
    """
    refusals = {}
    if (refused := uring_refusal()) is not None:
        refusals["io_uring"] = refused
    others = ["io_uring"]
    if torch.device(device).type != "cpu":
        others.append("cufile")
        if (refused := cufile_refusal(directory, device)) is not None:
            refusals["cufile"] = refused
    kinds = [DEFAULT] + [kind for kind in others if kind not in refusals]
    probes: dict[str, Probe] = {}
    for _ in range(NUM_ROUNDS if len(kinds) > 1 else 1):
        for kind in kinds:
            if kind in refusals:
                continue
            try:
                made = probe(
                    directory,
                    nbytes,
                    max_seconds=max_seconds,
                    kind=kind,
                    num_threads=num_threads,
                    device=device if kind == "cufile" else "cpu",
                )
            except OSError as error:
                if kind == DEFAULT:
                    raise
                refusals[kind] = error.strerror or str(error)  # it takes more descriptors, say
                probes.pop(kind, None)
                continue
            if kind not in probes or seconds_per_gb(made) < seconds_per_gb(probes[kind]):
                probes[kind] = made
    kind, reason = decide({kind: seconds_per_gb(made) for kind, made in probes.items()})
    return Choice(kind, probes, refusals, reason)


def seconds_per_gb(measured: Probe) -> float:
    """Seconds that 1e9 bytes need there and back."""
    return 1 / max(measured.write_gbs, 1e-9) + 1 / max(measured.read_gbs, 1e-9)


def decide(times: dict[str, float]) -> tuple[str, str]:
    """The engine to take, by seconds per GB there and back, and why."""
    best = min(times, key=lambda kind: times[kind])
    if len(times) == 1:
        return DEFAULT, "no other engine can be used here"
    gain = times[DEFAULT] / times[best]
    if best == DEFAULT:
        return DEFAULT, "no other engine is faster"
    if gain < MARGIN:
        return DEFAULT, f"{best} is {gain:.2f} times as fast: no more than noise"
    return best, f"{best} is {gain:.2f} times as fast as {DEFAULT}"
