"""What kind of tensor is saved: whether its storage can be moved, and whether it stands for it."""

from __future__ import annotations

import torch
from torch.nn import Parameter

_LEAST_PART = 8  # a view of less than this part of a storage does not say that it may go
_plain_by_keys: dict[int, bool] = {}


def is_part_of_data(tensor: torch.Tensor, nbytes: int) -> bool:
    """Whether the tensor is a small part of a storage of `nbytes` that no gradient concerns.

    A batch of labels that is a slice of all of them, say: the caller has the rest of it.
    """
    if tensor.requires_grad or _LEAST_PART * tensor.numel() * tensor.element_size() >= nbytes:
        return False
    # Inside of an autograd function no tensor needs a gradient, but what it is a view of may.
    return tensor._is_view() and tensor._base is not None and not tensor._base.requires_grad


def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a parameter or a view of one, which its module holds.

    Those of the model are known by their storages. A loss may run a network beside it.
    """
    return type(tensor) is Parameter or (tensor._is_view() and type(tensor._base) is Parameter)


def counts_for_itself(tensor: torch.Tensor, nbytes: int) -> bool:
    """Whether the tensor was changed in place, and its version tells nothing of its whole storage.

    The parts that `torch.unsafe_chunk` makes have a version each. An LSTM cell changes one gate in
    place and saves it, then the next: at the same version, in a storage that has changed since.
    """
    if tensor._version == 0:
        return False
    whole = tensor._base if tensor._is_view() else tensor
    return whole is None or whole.numel() * whole.element_size() < nbytes


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is nothing but strided bytes in a storage that can be moved."""
    if tensor.numel() == 0:
        return False
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    plain = _plain_by_keys.get(keys)
    if plain is None:
        plain = _plain_by_keys[keys] = _is_plain_kind(tensor)
    return plain


def _is_plain_kind(tensor: torch.Tensor) -> bool:
    """The same of all tensors with these dispatch keys: one for each thing asked here."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not tensor.is_inference()  # has no version
        and not tensor._is_zerotensor()  # what forward mode takes for no tangent: it has no bytes
    )
