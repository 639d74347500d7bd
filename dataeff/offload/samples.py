"""What was saved by steps in which everything was moved: of one of them the bytes of a plan are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dataeff.offload.likeness import Likeness
from dataeff.offload.report import ModuleBytes


@dataclass(frozen=True)
class Sample:
    """One round of such a step.

    Attributes:
        load: of the step, as `Likeness` counts it.
        largest: of one call of the model in it.
        modules: what each module saved, by its name.
        parts: bytes of each storage that may move, by block, in the order of saving.
    """

    load: int
    largest: int
    modules: dict[str, ModuleBytes]
    parts: dict[str, tuple[int, ...]]


class Samples:
    """Takes a sample of each such step.

    Attributes:
        taking: whether of the step under way.
    """

    def __init__(self) -> None:
        self.taking = False
        self._found: list[Sample] = []
        self._before: dict[str, ModuleBytes] = {}
        self._parts = defaultdict[str, list[int]](list)

    def begin(self, modules: Mapping[str, ModuleBytes], taking: bool) -> None:
        """A step begins; `modules` is what each module has saved so far."""
        self.taking = taking
        self._parts.clear()  # of a step that failed
        if taking:
            self._before = {name: replace(account) for name, account in modules.items()}

    def note(self, block: str, nbytes: int) -> None:
        """A block saves a storage that may move."""
        self._parts[block].append(nbytes)

    def end(self, modules: Mapping[str, ModuleBytes], num_rounds: int, likeness: Likeness) -> None:
        """The step ends; its rounds are alike."""
        if not self.taking:
            return
        saved = {
            name: (account - self._before.get(name, ModuleBytes())) // num_rounds
            for name, account in modules.items()
        }
        parts = {
            name: tuple(parts[: len(parts) // num_rounds]) for name, parts in self._parts.items()
        }
        self._found.append(Sample(likeness.load, likeness.largest, saved, parts))

    def largest(self) -> Sample:
        """The first of those with the greatest load."""
        return max(self._found, key=lambda sample: sample.load)

    def nearest(self, load: float) -> Sample:
        """The first of those whose load is nearest to `load`."""
        return min(self._found, key=lambda sample: abs(sample.load - load))
