"""What an offload did, in numbers that add up."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple


@dataclass
class Counters:
    """Running totals, in bytes of whole storages; guarded by the cache's lock."""

    num_packed: int = 0
    num_unpacked: int = 0
    bytes_packed: int = 0
    bytes_deduplicated: int = 0
    bytes_excluded: int = 0
    bytes_kept: int = 0
    bytes_unmovable: int = 0
    bytes_written: int = 0
    bytes_host: int = 0
    bytes_cancelled: int = 0
    bytes_failed: int = 0
    bytes_capped: int = 0
    bytes_read: int = 0
    bytes_forwarded: int = 0
    num_store_errors: int = 0
    num_load_errors: int = 0
    num_replans: int = 0
    peak_saved_bytes: int = 0
    peak_held_bytes: int = 0
    exposed_wait_s: float = 0.0
    transfer_s: float = 0.0


@dataclass
class ModuleBytes:
    """What one module saved for backward, in bytes of whole storages, each counted once.

    Attributes:
        bytes_saved: bytes of the storages first saved while it was the innermost module running.
        bytes_stored: of these, bytes that were sent to a tier.
        bytes_left: of these, bytes that copies keep in memory: ends that fill no block of a disk.
        bytes_again: bytes first saved while backward ran, by a checkpoint that runs the module
            again for one; they are in neither of the others.
    """

    bytes_saved: int = 0
    bytes_stored: int = 0
    bytes_left: int = 0
    bytes_again: int = 0

    def enter(self, nbytes: int, again: bool, stored: bool = False, left: int = 0) -> None:
        """A storage of `nbytes` was saved, by backward if `again`."""
        if again:
            self.bytes_again += nbytes
            return
        self.bytes_saved += nbytes
        if stored:
            self.bytes_stored += nbytes
            self.bytes_left += left

    def __sub__(self, other: ModuleBytes) -> ModuleBytes:
        """What has come since `other`."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return ModuleBytes(*(mine - theirs for mine, theirs in pairs))

    def __floordiv__(self, number: int) -> ModuleBytes:
        """The share of one of so many."""
        return ModuleBytes(*(mine // number for mine in vars(self).values()))


@dataclass(frozen=True)
class OffloadReport:
    """What was saved for backward since the object was made, and where it went.

    Every count is in bytes of whole storages: a tensor that is a view of a larger storage keeps
    all of it alive, so all of it is what saving costs. When nothing is in flight,
    `bytes_packed = bytes_deduplicated + bytes_kept + bytes_written + bytes_host + bytes_cancelled
    + bytes_failed + bytes_capped`.

    Attributes:
        num_packed: tensors saved for backward, parameters and caller-owned inputs left out.
        num_unpacked: times backward asked for one of them.
        bytes_packed: bytes of their storages, one term per saved tensor.
        bytes_deduplicated: of these, bytes in storages that were already saved.
        bytes_excluded: bytes of parameters, buffers and inputs, which are alive anyway.
        bytes_kept: bytes left in memory on purpose: too small, kept by the policy, the last of a
            pass, or of a kind that is not moved (sparse, quantised, tensor subclasses).
        bytes_unmovable: of these, bytes for which there is no tier: in host memory already, with
            only a host tier to go to.
        bytes_written: bytes written to disk.
        bytes_host: bytes copied to the host tier.
        bytes_cancelled: bytes whose queued transfer was stopped because backward came first.
        bytes_failed: bytes kept in memory because a tier was full or failed.
        bytes_capped: bytes kept in memory because no more may be written to the disks.
        bytes_read: bytes brought back from a tier.
        bytes_forwarded: bytes given to backward from memory although they had been sent to a tier:
            still in flight, or alive because somebody else holds the tensor.
        num_store_errors: stores that failed (the tensors stayed in memory).
        num_load_errors: prefetches that failed; the read is tried again when backward asks.
        num_replans: times backward left the predicted order.
        peak_saved_bytes: the most bytes of memory held for backward at once, over all tiers in
            memory: tensors kept or waiting for their store to finish, tensors prefetched or being
            read, staging buffers and the host tier. Bytes in files are not in it; nor are
            parameters and inputs, nor a tensor that only the model itself still holds.
        peak_held_bytes: the same without the host tier and its staging buffers: on a GPU, the most
            GPU memory held for backward at once.
        peak_host_bytes: the most bytes of the host tier that were taken at once, and of the staging
            buffers.
        peak_disk_bytes: the most bytes that were in spill files at once.
        saved_bytes: `peak_saved_bytes`, but now.
        exposed_wait_s: time forward or backward stood still for a transfer. On a GPU by its own
            time stamps, of what it has come to the end of: the host may be far ahead of it.
        transfer_s: time transfers took, summed over transfers, on a GPU by its time stamps.
        hidden_s: `transfer_s` less what was exposed: the part that ran beside compute.
        num_steps: `with` blocks that have ended.
        num_steps_at_rest: of these, steps that were not looked at, because those like them had
            nothing to move: what they saved is in none of the counts.
        step_s: mean seconds from one to the next.
        written_tb_per_day: rate of writing to disk since the object was made, TB (1e12 bytes).
        endurance_days: days until `endurance_tbw` is spent at that rate; None without one.
        modules: bytes by the name of the module that saved them.
        reason: one sentence why nothing was offloaded; empty when something was.
    """

    num_packed: int
    num_unpacked: int
    bytes_packed: int
    bytes_deduplicated: int
    bytes_excluded: int
    bytes_kept: int
    bytes_unmovable: int
    bytes_written: int
    bytes_host: int
    bytes_cancelled: int
    bytes_failed: int
    bytes_capped: int
    bytes_read: int
    bytes_forwarded: int
    num_store_errors: int
    num_load_errors: int
    num_replans: int
    peak_saved_bytes: int
    peak_held_bytes: int
    exposed_wait_s: float
    transfer_s: float
    peak_host_bytes: int
    peak_disk_bytes: int
    saved_bytes: int
    hidden_s: float
    num_steps: int
    step_s: float
    written_tb_per_day: float
    endurance_days: float | None
    num_steps_at_rest: int
    modules: dict[str, ModuleBytes]
    reason: str

    @property
    def bytes_offloaded(self) -> int:
        """Bytes that left memory, to whichever tier."""
        return self.bytes_written + self.bytes_host

    @property
    def bandwidth_gbs(self) -> float:
        """Bytes moved per second of transfer, in GB/s; transfers that overlap count each."""
        moved = self.bytes_offloaded + self.bytes_read
        return moved / self.transfer_s / 1e9 if self.transfer_s else 0.0

    @property
    def bytes_per_step(self) -> float:
        """Bytes offloaded per step; when nothing was, the bytes that a step saves."""
        saved = self.bytes_packed - self.bytes_deduplicated
        if self.bytes_offloaded:
            return self.bytes_offloaded / max(1, self.num_steps)
        return saved / max(1, self.num_steps - self.num_steps_at_rest)

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, for `dataeff plan --from-report`."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> OffloadReport:
        """Reads what `save` wrote. Raises ValueError naming the file when it is something else."""
        try:
            found = json.loads(Path(path).read_text())
            if not isinstance(found, dict):
                raise TypeError(f"it holds a {type(found).__name__}, where `save` writes an object")
            modules = {k: ModuleBytes(**v) for k, v in found.pop("modules").items()}
            report = cls(**found, modules=modules)
            for field in fields(cls):
                _check_number(field.name, field.type, getattr(report, field.name))
            return report
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved OffloadReport: {error}") from error

    def __str__(self) -> str:
        rows = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "modules"]
        lines = [
            f"{name:<20} {_readable(name, value)}"
            for name, value in rows
            if value not in ("", None)
        ]
        return "\n".join(lines)


def _check_number(name: str, kind: object, value: object) -> None:
    if kind not in ("int", "float"):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is no number")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r} is below 0, or without end")


class Pace(NamedTuple):
    """How a job goes on, in the terms of `OffloadReport`."""

    num_steps: int
    step_s: float
    written_tb_per_day: float
    endurance_days: float | None
    num_steps_at_rest: int


class Peaks(NamedTuple):
    """The most bytes that were in the tiers, in the terms of `OffloadReport`."""

    peak_host_bytes: int
    peak_disk_bytes: int


def make_report(
    counters: Counters,
    saved_bytes: int,
    min_bytes: int,
    modules: dict[str, ModuleBytes],
    pace: Pace,
    peaks: Peaks,
    kept_nameless: bool,
) -> OffloadReport:
    """Freezes the counters into a report; `kept_nameless` as in `Selection`."""
    return OffloadReport(
        **vars(counters),
        **peaks._asdict(),
        saved_bytes=saved_bytes,
        hidden_s=max(0.0, counters.transfer_s - counters.exposed_wait_s),
        **pace._asdict(),
        modules={name: replace(account) for name, account in modules.items()},
        reason=_why_nothing(counters, min_bytes, pace, kept_nameless),
    )


def _why_nothing(counters: Counters, min_bytes: int, pace: Pace, kept_nameless: bool) -> str:
    if counters.bytes_written or counters.bytes_host:
        return ""
    if not counters.num_packed:
        return (
            "Nothing was saved for backward while the offload was active: run the forward pass "
            "inside `with offload:`, on the thread that entered it, with gradients enabled and no "
            "other hooks on saved tensors inside."
        )
    if counters.bytes_capped:
        return "No more may be written to the disks (endurance_tbw, write_cap_tb)."
    if counters.bytes_failed:
        return "Every store failed or found its tier full, so all tensors stayed in memory."
    if counters.bytes_cancelled:
        return "Backward asked for every tensor before its transfer had begun."
    if counters.bytes_unmovable:
        return (
            "The tensors are in host memory already, so a host tier frees nothing: name a "
            "directory in spill=."
        )
    if kept_nameless:
        return (
            "The model runs inside something that is compiled as a whole, where no module has a "
            "name (the scope is ''), and the policy moves nothing of that: compile the blocks of "
            "the model one by one (block.compile()), or take policy='all'."
        )
    why = (
        f"All {counters.num_packed} saved tensors were kept: the policy keeps them, their kind is "
        f"not moved, or their storages are smaller than min_bytes={min_bytes}"
    )
    if pace.num_steps_at_rest:
        why += (
            f"; after that, {pace.num_steps_at_rest} of {pace.num_steps} steps, called with the "
            "same sizes, were not looked at"
        )
    return why + "."


def _readable(name: str, value: object) -> str:
    if name.endswith(("bytes", "_s")) or name.startswith("bytes"):
        assert isinstance(value, (int, float))
        return f"{value:.3f} s" if name.endswith("_s") else f"{value / 2**20:.1f} MiB"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
