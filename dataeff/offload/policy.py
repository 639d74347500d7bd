"""Which saved tensors leave memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dataeff.ledger import Tier
from dataeff.offload.exclude import Exclusions
from dataeff.offload.names import find_name, near_names
from dataeff.offload.regions import in_region
from dataeff.offload.scopes import outside_compiled


class SavedTensorInfo(NamedTuple):
    """What a policy is told about a tensor about to be saved.

    Attributes:
        shape: its size.
        dtype: its element type.
        device: where it is.
        storage_nbytes: bytes of the storage that it keeps alive.
        scope: the innermost module that is running, by its name in the model; "" outside.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    storage_nbytes: int
    scope: str = ""


Policy = Callable[[SavedTensorInfo], bool | Tier]


def resolve_policy(policy: str | Sequence[str] | Policy, model: torch.nn.Module) -> Policy:
    """The callable behind `policy`.

    Raises:
        TypeError: it is of no kind that can be a policy.
        ValueError: a policy, or a module, of that name does not exist, or the module lies in one
            that is compiled, which is told apart as a whole only.
    """
    if callable(policy):
        return policy
    if isinstance(policy, str):
        if policy == "all":
            return lambda info: True
        raise ValueError(
            f"policy: {policy!r} is neither 'all', 'auto', a list of module names nor a callable"
        )
    try:
        names = list(policy)
    except TypeError:
        raise TypeError(
            f"policy: {policy!r} is neither a name, a list of them nor a callable"
        ) from None
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"policy: {name!r} in the list is no name of a module")
    # A module that stands in several places runs under the first of its names.
    first = {module: name for name, module in outside_compiled(model)}
    known = dict(model.named_modules(remove_duplicate=False))
    chosen: set[str] = set()
    for name in names:
        module = _named(name, known)
        if module not in first:
            raise ValueError(
                f"policy: {name!r} lies in a module that is compiled, and what that saves is not "
                f"told apart. Name the compiled one, or compile {name!r} by itself instead"
            )
        chosen |= {first[inner] for inner in module.modules() if inner in first}
    return lambda info: _within(info.scope, chosen)


def _named(name: str, known: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    found = find_name(name, known)
    if found is None:
        near = " or ".join(map(repr, near_names(name, known)))
        raise ValueError(
            f"policy: the model has no module named {name!r}; "
            + (f"did you mean {near}?" if near else "model.named_modules() tells its names")
        )
    return known[found]


def _within(scope: str, names: Container[str]) -> bool:
    while scope and scope not in names:
        scope = scope.rpartition(".")[0]
    return scope in names


def _tier(answer: str) -> bool | Tier:
    try:
        tier = Tier(answer)
    except ValueError:
        raise ValueError(f"policy: {answer!r} is no tier: device, host or disk") from None
    return tier is not Tier.DEVICE and tier  # where the tensor is


@dataclass
class Selection:
    """Decides about one storage: its size, its device, whether it is a weight, then the policy.

    Attributes:
        policy: the last word.
        moves: whether some tier frees memory of a device.
        min_bytes: smaller storages stay in memory.
        exclusions: knows which tensors are casts of parameters.
        kept_nameless: whether the policy kept what something compiled saved outside of all modules
            that have a name: which of them it was cannot be told.
    """

    policy: Policy
    moves: Callable[[torch.device], bool]
    min_bytes: int
    exclusions: Exclusions
    kept_nameless: bool = False

    def __call__(self, tensor: torch.Tensor, nbytes: int, scope: str) -> bool | Tier:
        """Whether the storage of `tensor`, of `nbytes`, is to be stored, or in which tier."""
        if nbytes < self.min_bytes or not self.moves(tensor.device):
            return False
        if self.exclusions.is_cast(tensor):
            return False
        info = SavedTensorInfo(tensor.shape, tensor.dtype, tensor.device, nbytes, scope)
        wanted = self.policy(info)
        if isinstance(wanted, str):  # as a Tier is
            wanted = _tier(wanted)
        if not (wanted or scope or self.kept_nameless):
            self.kept_nameless = in_region()
        return wanted
