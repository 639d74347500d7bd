"""The language-model part of the demo: one training twice, keeping and spilling activations.

Both arms start from the same weights and see the same batches; they take their steps in turn, so
that whatever else the machine does slows both. The losses and the final weights must be the same
bits.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dataeff.data import ByteCorpus
from dataeff.demo.gpt import GPT, NUM_BYTES
from dataeff.demo.saved_bytes import SavedBytes
from dataeff.demo.settings import TextSettings
from dataeff.demo.timeline import middle_stretch
from dataeff.ledger import Ledger
from dataeff.offload import ActivationOffload

_WARMUP_STEPS = 5  # of the learning rate


class SpillError(RuntimeError):
    """The spill directory cannot take what a step saves."""


class Trainer:
    """One arm: a model, its optimiser and its times.

    Args:
        settings: sizes.
        device: where it runs.
        seed: of the weights.
    """

    def __init__(self, settings: TextSettings, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = GPT(
            settings.dim, settings.num_layers, settings.num_heads, settings.context
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), settings.learning_rate)
        self.learning_rate = settings.learning_rate
        self.ledger = Ledger()
        self.losses: list[float] = []
        self.times_s: list[float] = []

    def step(self, tokens: Tensor, targets: Tensor, saving: Any) -> None:
        """One training step with what `saving` does about saved tensors."""
        started = time.perf_counter()
        with saving:
            with self.ledger.timed("compute", "forward"):
                scores = self.model(tokens)
                loss = F.cross_entropy(scores.view(-1, NUM_BYTES), targets.reshape(-1))
            with self.ledger.timed("compute", "backward"):
                loss.backward()
        with self.ledger.timed("compute", "optimizer"):
            warm = min(1.0, (len(self.losses) + 1) / _WARMUP_STEPS)
            self.optimizer.param_groups[0]["lr"] = warm * self.learning_rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(loss.item())  # also waits for the device
        self.times_s.append(time.perf_counter() - started)


def run_lm(
    settings: TextSettings, device: torch.device, seed: int, spill: Path, console: Any
) -> dict[str, Any]:
    """Trains both arms and returns every figure.

    Args:
        settings: sizes.
        device: where the models run.
        seed: of weights and batches.
        spill: an existing directory on the disk to spill to; nothing is left in it.
        console: shows progress, as `dataeff.demo.console.Console`.

    Raises:
        SpillError: the directory cannot be written to, or has no room for one step.
    """
    corpus = ByteCorpus(max_bytes=settings.max_bytes)
    keep, offloaded = (Trainer(settings, device, seed) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    peak_keep = 0
    started = time.perf_counter()
    with ExitStack() as stack:
        offload = stack.enter_context(_Offload(offloaded, settings, spill))
        advance = stack.enter_context(console.task("train GPT: keep and offload, in turn"))
        for step in range(settings.num_steps):
            batch = corpus.batch(settings.batch_size, settings.context, generator)
            tokens, targets = (t.contiguous().to(device) for t in batch)
            counted = step < settings.num_warmup
            saved = SavedBytes([*keep.model.parameters(), tokens, targets]) if counted else None
            arms = [(keep, saved or nullcontext()), (offloaded, offload.saving)]
            if saved is not None and step == 0:
                keep.step(tokens, targets, saved)
                _check_room(spill, saved.peak)
                offloaded.step(tokens, targets, offload.saving)
            else:
                for trainer, saving in arms[:: 1 if step % 2 else -1]:
                    trainer.step(tokens, targets, saving)
            peak_keep = max(peak_keep, saved.peak if saved is not None else 0)
            advance(step + 1, settings.num_steps)
            if step > settings.num_warmup and time.perf_counter() - started > settings.max_seconds:
                break
        report = offload.saving.report()
        timeline = middle_stretch(offload.saving.ledger.spans, "compute", num_spans=3)
    return _figures(settings, corpus, keep, offloaded, peak_keep, report) | {
        "spill_directory": str(spill),
        "timeline": timeline,
        "train_s": time.perf_counter() - started,
    }


class _Offload:
    """An `ActivationOffload` whose files are gone at the end, with errors a user can act on."""

    def __init__(self, trainer: Trainer, settings: TextSettings, spill: Path) -> None:
        self._directory = _make_directory(spill)
        try:
            self.saving = ActivationOffload(
                trainer.model, spill=[self._directory], min_bytes=settings.min_bytes
            )
        except OSError as error:
            shutil.rmtree(self._directory)
            raise SpillError(f"cannot spill activations to {spill}: {error}") from error
        trainer.ledger = self.saving.ledger  # transfers and compute on one timeline

    def __enter__(self) -> _Offload:
        return self

    def __exit__(self, *_: object) -> None:
        self.saving.close()
        shutil.rmtree(self._directory)


def _make_directory(spill: Path) -> str:
    try:
        return tempfile.mkdtemp(prefix="spill-", dir=spill)
    except OSError as error:
        raise SpillError(
            f"cannot spill activations to {spill}: {error.strerror}. Name a directory that can "
            "be written to, on a disk with some free gigabytes"
        ) from error


def check_spill(spill: Path) -> None:
    """Raises SpillError when a directory cannot be written to."""
    os.rmdir(_make_directory(spill))


def _check_room(spill: Path, nbytes: int) -> None:
    free = shutil.disk_usage(spill).free
    if free < 2 * nbytes:
        raise SpillError(
            f"{spill} has {free / 2**20:.0f} MiB free, and a step saves {nbytes / 2**20:.0f} MiB: "
            "free some space or name a directory on another disk"
        )


def _figures(
    settings: TextSettings,
    corpus: ByteCorpus,
    keep: Trainer,
    offloaded: Trainer,
    peak_keep: int,
    report: Any,
) -> dict[str, Any]:
    weights = zip(
        keep.model.state_dict().values(), offloaded.model.state_dict().values(), strict=True
    )
    timed = [t.times_s[settings.num_warmup :] or t.times_s for t in (keep, offloaded)]
    keep_s, offload_s = (statistics.median(times) for times in timed)
    return {
        "weights_identical": all(torch.equal(a, b) for a, b in weights),
        "losses_identical": keep.losses == offloaded.losses,
        "peak_saved_bytes_keep": peak_keep,
        "peak_saved_bytes_offload": report.peak_saved_bytes,
        "peak_saved_share": report.peak_saved_bytes / max(peak_keep, 1),
        "bytes_written": report.bytes_written,
        "bytes_read": report.bytes_read,
        "bytes_forwarded": report.bytes_forwarded,
        "exposed_wait_s": report.exposed_wait_s,
        "step_time_keep_s": keep_s,
        "step_time_offload_s": offload_s,
        "step_time_ratio": offload_s / keep_s,
        "num_steps": len(keep.losses),
        "num_store_errors": report.num_store_errors,
        "num_parameters": sum(p.numel() for p in keep.model.parameters()),
        "corpus_bytes": len(corpus),
        "losses_keep": keep.losses,
        "losses_offload": offloaded.losses,
        "offload_report": asdict(report),
    }
