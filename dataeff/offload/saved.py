"""The bytes of one storage that backward will need, wherever they are, and the handles on them.

A `SavedStorage` is in memory (`storage` is held), in a tier (`copy` is complete), or both while a
transfer is under way. Autograd holds a `Handle` per saved tensor; when the graph lets the last one
go, the memory is freed at once and the copy is returned to its tier at the next opportunity.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dataeff.ledger import Tier
from dataeff.offload.identity import VersionProbe, View, changed_in_place
from dataeff.offload.schedule import Tape
from dataeff.offload.transfer import Copy, Load


class Remains(NamedTuple):
    """What a dead `SavedStorage` leaves to be accounted for."""

    copy: Copy | None
    held_nbytes: int
    cached_nbytes: int


Grave = deque[Remains | int]  # what is left, or just how many bytes were held


class SavedStorage:
    """One storage at one version. All fields are guarded by the cache's lock.

    Attributes:
        storage: the bytes in memory, while they are held; the first one is at `shift`.
        copy: the bytes in a tier, complete unless `writing`.
        load: the read under way, if any.
        weak: the last storage known to hold the bytes, alive as long as anybody holds it.
        home: the tier that the device of the storage is.
        cached: held in memory although a complete copy exists.
        tape: the pass that it belongs to, and its position there.
    """

    # One is made for every storage that forward saves: what begins alike is the class's.
    shift = 0
    copy: Copy | None = None
    load: Load | None = None
    arrived: Load | None = None  # how `storage` came back
    writing = False
    cached = False
    tape: Tape | None = None
    position = -1
    _num_handles = 0
    _pass = 0
    _num_seen = 0  # handles unpacked in this pass

    def __init__(
        self, generation: int, version: int, storage: torch.UntypedStorage, grave: Grave
    ) -> None:
        self._grave = grave
        self.generation = generation
        self.version = version
        self.nbytes = storage.nbytes()
        self.device = storage.device
        self.storage: torch.UntypedStorage | None = storage
        self.home = Tier.HOST if storage.device.type == "cpu" else Tier.DEVICE
        self.weak = StorageWeakRef(storage)
        self._dead: deque[int] = deque()  # of each dead handle, the pass it was last unpacked in

    def add_handle(self) -> None:
        """Counts a new handle."""
        self._num_handles += 1

    @property
    def wanted(self) -> bool:
        """Whether any handle is alive."""
        return len(self._dead) < self._num_handles

    @property
    def in_use(self) -> bool:
        """Whether backward has unpacked some handle in this pass."""
        return self._num_seen > 0

    def see(self, handle: Handle) -> bool:
        """Notes that `handle` is unpacked; true when every live handle has been, in this pass.

        The bytes are then given up (if there is a copy), and a new pass begins: with
        `retain_graph=True` the handles live on and may all be unpacked again.
        """
        if handle.last_pass != self._pass:
            handle.last_pass = self._pass
            self._num_seen += 1
        if self._num_seen - self._dead.count(self._pass) < self._num_handles - len(self._dead):
            return False
        self._pass += 1
        self._num_seen = 0
        return True

    def restore(self, load: Load) -> None:
        """The bytes are in memory again."""
        self.storage, self.shift = load.storage, load.shift
        self.weak = StorageWeakRef(load.storage)
        self.arrived = load

    def __del__(self) -> None:
        # Runs wherever the graph is freed, even inside the collector: no lock may be taken here.
        held = self.nbytes if self.storage is not None else 0
        self._grave.append(Remains(self.copy, held, self.nbytes if self.cached else 0))


class Handle:
    """What autograd keeps instead of a saved tensor."""

    __slots__ = ("last_pass", "probe", "saved", "view")

    def __init__(self, saved: SavedStorage, tensor: torch.Tensor, shift: int) -> None:
        saved.add_handle()
        self.saved = saved
        self.view = View.of(tensor, shift)
        self.probe = VersionProbe(tensor)
        self.last_pass = -1

    def check_version(self) -> None:
        """Raises RuntimeError when the tensor was changed in place after it was saved."""
        if self.probe.current != self.probe.version:
            raise changed_in_place(self.view.size, self.probe.version, self.probe.current)

    def rebuild(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The saved tensor over `storage`, under its own version counter."""
        return self.probe.attach(self.view.over(storage, self.saved.shift))

    def __del__(self) -> None:
        self.saved._dead.append(self.last_pass)
