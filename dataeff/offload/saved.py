"""The bytes of one storage that backward will need, wherever they are, and the handles on them.

A `SavedStorage` is in memory (`storage` is held), in a tier (`copy` is complete), or both while a
transfer is under way. Autograd holds a `Handle` per saved tensor; when the graph lets the last one
go, the memory is freed at once and the copy is returned to its tier at the next opportunity.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dataeff.ledger import Tier
from dataeff.offload.identity import Spread, VersionProbe, View, changed_in_place
from dataeff.offload.schedule import Tape
from dataeff.offload.streams import Arrival
from dataeff.offload.transfer import Copy, Load

if TYPE_CHECKING:
    from dataeff.offload.kept import Direct


class Remains(weakref.ref["SavedStorage | Direct"]):
    """What dies leaves to be accounted for; C code notes the death, which nothing can interrupt.

    Attributes:
        copy: bytes in a tier that are to be released.
        held_nbytes: bytes of memory that it holds.
        cached_nbytes: of these, bytes that are in a tier too.
        last_nbytes: of these, bytes that stayed because backward wants them first.
        weak: the last storage known to hold the bytes; here, because its end runs code of Python.
    """

    __slots__ = ("cached_nbytes", "copy", "held_nbytes", "last_nbytes", "weak")

    copy: Copy | None
    weak: StorageWeakRef
    held_nbytes: int
    cached_nbytes: int
    last_nbytes: int


class Grave:
    """What has died and is not yet accounted for.

    Attributes:
        dead: in the order of death. A queue that C code appends to: things die wherever a graph is
            freed, even inside the collector, where no lock may be taken.
    """

    def __init__(self) -> None:
        self.dead: deque[Remains] = deque()
        self._alive: set[Remains] = set()

    def watch(self, owner: SavedStorage | Direct, held_nbytes: int) -> Remains:
        """What `owner` will leave; it keeps that up to date."""
        remains = Remains(owner, self.dead.append)
        remains.copy, remains.held_nbytes = None, held_nbytes
        remains.cached_nbytes = remains.last_nbytes = 0
        self._alive.add(remains)
        return remains

    def watched(self) -> list[Remains]:
        """What the living, and the dead that are not buried, leave or will leave."""
        return list(self._alive)

    @property
    def wanted_nbytes(self) -> int:
        """Bytes of the living that may be asked for."""
        owners = [remains() for remains in self._alive]
        return sum(owner.nbytes for owner in owners if owner is not None and owner.wanted)

    def bury(self) -> Remains:
        """Takes the first of the dead."""
        self._alive.discard(self.dead[0])  # first: an interrupt between the two does no harm then
        return self.dead.popleft()


class SavedStorage:
    """One storage at one version. All fields are guarded by the cache's lock.

    Attributes:
        storage: the bytes in memory, while they are held; the first one is at `shift`.
        copy: the bytes in a tier, complete unless `writing`.
        load: the read under way, if any.
        home: the tier that the device of the storage is.
        cached: held in memory although a complete copy exists.
        tape: the pass that it belongs to, and its position there.
    """

    # One is made for every storage that forward saves: what begins alike is the class's.
    shift = 0
    load: Load | None = None
    arrival: Arrival | None = None  # of what `weak` is of, if a device's copy brought it back
    writing = False
    tape: Tape | None = None
    position = -1
    _pass = 0
    _num_seen = 0  # handles unpacked in this pass
    _num_spent = 0  # of these, handles that died in it

    def __init__(
        self, generation: int, version: int, storage: torch.UntypedStorage, grave: Grave
    ) -> None:
        self.generation = generation
        self.version = version
        self.nbytes = storage.nbytes()
        self.device = storage.device
        self._remains = grave.watch(self, self.nbytes)
        self._storage: torch.UntypedStorage | None = storage
        self.home = Tier.HOST if storage.device.type == "cpu" else Tier.DEVICE
        self.weak = StorageWeakRef(storage)
        self._handles: set[HandleRef] = set()  # whose death is not yet noticed
        self._dead: deque[HandleRef] = deque()

    @property
    def storage(self) -> torch.UntypedStorage | None:
        """The bytes in memory."""
        return self._storage

    @storage.setter
    def storage(self, storage: torch.UntypedStorage | None) -> None:
        self._storage = storage
        self._remains.held_nbytes = 0 if storage is None else self.nbytes

    @property
    def copy(self) -> Copy | None:
        """The bytes in a tier."""
        return self._remains.copy

    @copy.setter
    def copy(self, copy: Copy | None) -> None:
        self._remains.copy = copy

    @property
    def to_host(self) -> bool:
        """Whether the bytes are in the host tier, or on their way there."""
        return self.copy is not None and self.copy.tier is Tier.HOST

    @property
    def cached(self) -> bool:
        """Whether the bytes are in memory although a complete copy exists."""
        return self._remains.cached_nbytes > 0

    @cached.setter
    def cached(self, cached: bool) -> None:
        self._remains.cached_nbytes = self.nbytes if cached else 0

    @property
    def weak(self) -> StorageWeakRef:
        """The last storage known to hold the bytes, alive as long as anybody holds it."""
        return self._remains.weak

    @weak.setter
    def weak(self, weak: StorageWeakRef) -> None:
        self._remains.weak = weak

    @property
    def stays(self) -> bool:
        """Whether the bytes are in memory alone because backward will soon want them."""
        return self._remains.last_nbytes > 0

    @stays.setter
    def stays(self, stays: bool) -> None:
        self._remains.last_nbytes = self.nbytes if stays else 0

    def add_handle(self, handle: Handle) -> HandleRef:
        """Counts a new handle for as long as it lives."""
        ref = HandleRef(handle, self._dead.append)
        ref.last_pass = -1
        self._handles.add(ref)
        return ref

    @property
    def wanted(self) -> bool:
        """Whether any handle is alive."""
        return len(self._dead) < len(self._handles)

    def _notice_deaths(self) -> None:
        while self._dead:
            ref = self._dead[0]
            self._num_spent += ref.last_pass == self._pass
            self._handles.discard(ref)
            self._dead.popleft()

    @property
    def in_use(self) -> bool:
        """Whether backward has unpacked some handle in this pass."""
        return self._num_seen > 0

    def see(self, handle: Handle) -> bool:
        """Notes that `handle` is unpacked; true when every live handle has been, in this pass.

        The bytes are then given up (if there is a copy), and a new pass begins: with
        `retain_graph=True` the handles live on and may all be unpacked again.
        """
        if handle.ref.last_pass != self._pass:
            handle.ref.last_pass = self._pass
            self._num_seen += 1
        self._notice_deaths()
        if self._num_seen - self._num_spent < len(self._handles):
            return False
        self._pass += 1
        self._num_seen = self._num_spent = 0
        return True

    def restore(self, load: Load) -> None:
        """The bytes are in memory again."""
        self.storage, self.shift = load.storage, load.shift
        self.weak = StorageWeakRef(load.storage)
        self.arrival = load.arrival


class HandleRef(weakref.ref["Handle"]):
    """Tells the death of a handle.

    Autograd lets handles go in the middle of its own code: what Python ran there (`__del__`, say)
    would be where a signal is heard, and what the signal's handler raises would be lost.

    Attributes:
        last_pass: the pass in which the handle was last unpacked.
    """

    __slots__ = ("last_pass",)

    last_pass: int


class Handle:
    """What autograd keeps instead of a saved tensor."""

    __slots__ = ("__weakref__", "probe", "ref", "saved", "view")

    def __init__(self, saved: SavedStorage, tensor: torch.Tensor, shift: int) -> None:
        self.view: View | Spread = View.of(tensor, shift)
        self.probe = VersionProbe(tensor)
        self.saved = saved
        self.ref = saved.add_handle(self)

    def check_version(self) -> None:
        """Raises RuntimeError when the tensor was changed in place after it was saved."""
        if self.probe.current != self.probe.version:
            raise changed_in_place(self.view.size, self.probe.version, self.probe.current)

    def rebuild(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The saved tensor over `storage`, under its own version counter."""
        return self.probe.attach(self.view.over(storage, self.saved.shift))
