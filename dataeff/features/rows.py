"""Where a table's rows are: the interface that `FeatureTable` drives, and rows in host memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from dataeff import _core
from dataeff._ops import row_span, with_memory
from dataeff.features.bits import pickled, unpickled
from dataeff.features.gather import gather, scatter_
from dataeff.features.registration import RegisteredMemory
from dataeff.features.stats import Account
from dataeff.ledger import Tier
from dataeff.memory import SharedTensor, share_


class Rows(ABC):
    """Rows of one shape and dtype, wherever they are: what a table asks of them.

    A gather may run in several threads at once, and while the table is closed: whoever gathers
    holds the rows, and `release` waits for those under way. Pickled, rows carry what it takes to
    find them again.

    Attributes:
        shape: [num_rows, ...], as gathered.
        dtype: as gathered.
        asynchronous: whether a gather to CUDA is queued on the current stream; one that keeps the
            host busy is prefetched in a thread.
        traceable: whether a gather is operators over tensors, which a compiled graph may hold;
            other rows are gathered by one operator that calls `gather`.
    """

    shape: torch.Size
    dtype: torch.dtype
    asynchronous: bool = True
    traceable: bool = True

    @property
    def deliveries(self) -> tuple[torch.dtype, ...]:
        """The dtypes that a gather can deliver, all of them where it is given `out`."""
        return (self.dtype,)

    @abstractmethod
    def gather(self, index: Tensor, out: Tensor | None, account: Account) -> Tensor:
        """`out[i] = rows[index[i]]`, checked as `dataeff.features.gather.gather` checks.

        Enters what was delivered, and from which tier, in the account.
        """

    def gather_at_once(self, index: Any, out: Tensor | None, account: Account) -> Tensor | None:
        """The same where nothing is out of the ordinary; None, with nothing done, elsewhere."""
        return None

    def gather_traced(self, index: Tensor, out: Tensor | None) -> Tensor:
        """The same while `torch.compile` traces: operators alone, no account. If `traceable`."""
        raise NotImplementedError(f"{type(self).__name__} are gathered by no operator of their own")

    @abstractmethod
    def scatter_(self, index: Tensor, rows: Tensor) -> None:
        """`rows[index[i]] = rows[i]`, or raises TypeError saying why these cannot be written."""

    @abstractmethod
    def register(self, device: torch.device) -> None:
        """Prepares gathers to a CUDA device ahead of the first."""

    def host_tensor(self) -> Tensor:
        """The tensor that holds the rows, or TypeError when no tensor does."""
        raise TypeError(f"{type(self).__name__} are in no tensor: table[:] gathers all of them")

    def share_(self) -> None:
        """Moves the rows into memory that other processes of the machine can map."""
        raise TypeError(
            f"{type(self).__name__} are in no host memory that processes could share: send the "
            "table as it is, which opens its files there"
        )

    def settle(self, account: Account) -> None:
        """Enters what a device has counted since; most rows enter everything as they gather."""
        return

    def forked(self) -> None:
        """Called in a forked child: what belongs to the parent's threads and devices is let be."""
        return

    @abstractmethod
    def release(self) -> None:
        """Waits for gathers under way and gives back what was taken. A second call is nothing."""


_HOST = Tier.HOST  # members of an Enum are slow to look up


def entered_from_host(account: Account, index: Tensor, rows: Tensor) -> None:
    """Enters a gather that took every row from host memory."""
    account.gathered(index.numel(), _HOST, _HOST if rows.is_cpu else Tier.DEVICE, rows.nbytes)


def check_source(x: object) -> None:
    """TypeError or ValueError, with what helps, unless a table can be made of `x`."""
    if not isinstance(x, Tensor):
        remedy = "pass torch.as_tensor(x), which takes an array's memory as it is"
        if isinstance(x, (str, os.PathLike)):
            remedy = "FeatureTable.open(path) reads rows of a file"
        elif hasattr(x, "prefetch"):
            remedy = "it is a table already; x[:] are the rows for another"
        raise TypeError(f"a table is made of a torch.Tensor, got {type(x).__name__}: {remedy}")
    if x.device.type != "cpu":
        raise ValueError(f"a table is made of host memory, got a tensor on {x.device}: x.cpu()")
    if x.is_nested:
        raise ValueError(
            "a table has rows of one length, not a nested tensor: x.to_padded_tensor(0)"
        )
    if x.layout != torch.strided:
        raise ValueError(f"a table is made of a dense tensor, got {x.layout}: x.to_dense()")
    if x.is_quantized:
        raise ValueError(f"x is {x.dtype}: pass x.dequantize(), and store='int8' for small rows")
    if x.is_conj() or x.is_neg():  # what the memory holds is not what the tensor says
        raise ValueError("x is a lazy view of other values: x.resolve_conj().resolve_neg()")
    with_memory(x, "x")
    if x.requires_grad:
        raise ValueError("x asks for gradients, which a gather passes on to nobody: x.detach()")


def storages(*tensors: Tensor | None) -> tuple[UntypedStorage, ...]:
    """What a gather on the CPU holds until it has read: another thread may share its table.

    The tensors are somewhere else then, and what they were in goes with the last who holds it.
    """
    return tuple(x.untyped_storage() for x in tensors if x is not None)


def shared_rows(x: Tensor) -> Tensor:
    """Moves a tensor into shared memory, in place, and gives it without what it is a view of.

    A view keeps its base, whose memory is the one that it has left, as long as it is there itself.
    """
    share_(x)
    return x.detach() if x._is_view() else x


# Below this the last-level cache and the TLB hold much of a table, and huge pages bring little.
_HUGE_PAGES_FROM = 64 << 20


class HostRows(Rows):
    """Rows of a host tensor, read in place by whichever device gathers.

    Args:
        x: [num_rows, ...], each row contiguous, rows at any stride.
        huge_pages: as for `FeatureTable`.

    Raises:
        TypeError: `x` is no tensor.
        ValueError: `x` is not in host memory, not dense, asks for gradients, or has rows not
            contiguous.
    """

    def __init__(self, x: Tensor, huge_pages: bool | None = None) -> None:
        check_source(x)
        if type(x) is not Tensor:  # a plain one stays itself, to move along when it is shared
            x = with_memory(x, "x").as_subclass(Tensor)  # of a unified tensor the memory
        # A layout that cannot be gathered is refused here, not at the first batch.
        gather(x, torch.empty(0, dtype=torch.int64, device="cpu"))
        if huge_pages is None:
            huge_pages = row_span(x)[1] >= _HUGE_PAGES_FROM and not torch.cuda.is_available()
        if huge_pages:
            _core.move_into_huge_pages(*row_span(x), torch.get_num_threads())
        self._memory = RegisteredMemory(x)
        self._held = storages(x)
        self.shape = x.shape
        self.dtype = x.dtype

    def gather(self, index: Tensor, out: Tensor | None, account: Account) -> Tensor:
        """By threads on the CPU, by a kernel that reads the memory in place on CUDA."""
        if index.is_cuda:
            with self._memory.readable(index.device):
                rows = gather(self._memory.x, index, out)
        else:
            held = self._held
            rows = gather(self._memory.x, index, out)
            del held
        entered_from_host(account, index, rows)
        return rows

    def gather_at_once(self, index: Any, out: Tensor | None, account: Account) -> Tensor | None:
        """By threads on the CPU, in one call of the core."""
        held = self._held
        rows = _core.gather_tensors(self._memory.x, index, out, account.tally)
        del held
        return rows

    def gather_traced(self, index: Tensor, out: Tensor | None) -> Tensor:
        """The operator alone."""
        return gather(self._memory.x, index, out)

    def scatter_(self, index: Tensor, rows: Tensor) -> None:
        """Writes into the tensor, after the gathers under way."""
        index, rows = index.cpu(), rows.cpu()
        with self._memory.written():  # nobody may see half a row
            scatter_(self._memory.x, index, rows)

    def register(self, device: torch.device) -> None:
        """Registers the memory with CUDA."""
        self._memory.register(device)

    def host_tensor(self) -> Tensor:
        """The tensor the rows are in."""
        return self._memory.x

    def share_(self) -> None:
        """Moves the tensor, in place."""
        with self._memory.unread():
            self._memory.x = shared_rows(self._memory.x)
        self._held = storages(self._memory.x)

    def release(self) -> None:
        """Gives the registration back."""
        self._memory.release()

    def __getstate__(self) -> dict[str, Any]:
        return {"x": pickled(self._memory.x)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(unpickled(*state["x"]))  # type: ignore[misc]


def _receive(shared: SharedTensor) -> HostRows:
    return HostRows(shared.tensor())


def _send(rows: HostRows) -> tuple[Callable[[SharedTensor], HostRows], tuple[SharedTensor]]:
    rows.share_()
    return _receive, (SharedTensor(rows.host_tensor()),)


# Between processes rows travel as a descriptor; pickle alone, as in a file, copies them.
ForkingPickler.register(HostRows, _send)
