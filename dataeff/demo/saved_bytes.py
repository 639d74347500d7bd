"""Counts what plain autograd keeps in memory for backward, by the rules of `ActivationOffload`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """A context that keeps every saved tensor and counts their storages.

    A storage counts once, whole, for as long as any tensor saved in it is held; storages of
    `excluded` tensors (parameters, inputs) are alive anyway and do not count.

    Args:
        excluded: tensors whose storages are left out.

    Attributes:
        now: bytes held now.
        peak: the most bytes held at once.
    """

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self._excluded = {t.untyped_storage().data_ptr() for t in excluded}
        self._users: Counter[int] = Counter()
        self.now = self.peak = 0
        self._hooks = saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor, self)
        if saved.storage not in self._excluded:
            if not self._users[saved.storage]:
                self.now += saved.nbytes
                self.peak = max(self.peak, self.now)
            self._users[saved.storage] += 1
        return saved

    def _drop(self, saved: _Saved) -> None:
        if saved.storage not in self._excluded:
            self._users[saved.storage] -= 1
            if not self._users[saved.storage]:
                del self._users[saved.storage]
                self.now -= saved.nbytes

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)


class _Saved:
    """One saved tensor; the autograd graph owns it."""

    def __init__(self, tensor: Tensor, account: SavedBytes) -> None:
        self.tensor = tensor
        storage = tensor.untyped_storage()
        self.storage, self.nbytes = storage.data_ptr(), storage.nbytes()
        self._account = account

    def __del__(self) -> None:
        self._account._drop(self)
