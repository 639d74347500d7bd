"""Which saved tensors leave memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dataeff.offload.exclude import Exclusions


@dataclass(frozen=True)
class SavedTensorInfo:
    """What a policy is told about a tensor about to be saved.

    Attributes:
        shape: its size.
        dtype: its element type.
        device: where it is.
        storage_nbytes: bytes of the storage that it keeps alive.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    storage_nbytes: int


Policy = Callable[[SavedTensorInfo], bool]


def resolve_policy(policy: str | Policy) -> Policy:
    """The callable behind `policy`. Raises ValueError for a name that is not known."""
    if policy == "all":
        return lambda info: True
    if callable(policy):
        return policy
    raise ValueError(f"policy: {policy!r} is neither 'all' nor a callable")


@dataclass(frozen=True)
class Selection:
    """Decides about one storage: its size, its device, then the policy.

    Attributes:
        policy: the last word.
        min_bytes: smaller storages stay in memory.
        exclusions: knows which tensors are casts of parameters.
    """

    policy: Policy
    min_bytes: int
    exclusions: Exclusions

    def __call__(self, tensor: torch.Tensor, nbytes: int) -> bool:
        """Whether the storage of `tensor`, of `nbytes`, is to be stored."""
        if nbytes < self.min_bytes or tensor.device.type != "cpu":
            return False
        if self.exclusions.is_cast(tensor):
            return False
        return self.policy(SavedTensorInfo(tensor.shape, tensor.dtype, tensor.device, nbytes))
