"""What the drop-ins' constructors have in common: optional parameters, refused arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def optional(module: torch.nn.Module, name: str, present: bool, *shape: int) -> None:
    """Register a parameter that may be absent."""
    module.register_parameter(name, Parameter(torch.empty(shape)) if present else None)


def check_width(layer: str, in_channels: int | tuple[int, int], *, pair: bool = False) -> None:
    """A width of -1 is for `HGTConv` alone, as in PyTorch Geometric; `pair`: there may be two.

    Raises:
        TypeError: one width for sources and one for destinations, where the layer has one for both.
        ValueError: a negative width.
    """
    widths = in_channels if isinstance(in_channels, tuple) else (in_channels,)
    if len(widths) > 1 and not pair:
        raise TypeError(f"{layer}: in_channels is {in_channels}; sources and destinations have one")
    if min(widths) < 0:
        raise ValueError(
            f"{layer}: in_channels is {in_channels}; give the number of features, for this layer"
            " does not take it from its first input, as HGTConv does"
        )


def check_tensor(layer: str, given: Any, name: str) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: names the argument.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"{layer}: {name} must be a tensor, got {type(given).__name__}")


def pair_of(layer: str, x: Any, *, or_none: bool = False) -> tuple[Any, Any]:
    """Features of the sources and of the destinations, of one set of nodes or of two.

    Raises:
        TypeError: names what is neither a tensor (`or_none`) nor a pair of them.
    """
    pair = x if isinstance(x, tuple) else (x, x)
    if len(pair) != 2:
        raise TypeError(f"{layer}: x is a tensor or a pair of them, got {len(pair)}")
    for rows in pair:
        if rows is not None or not or_none:
            check_tensor(layer, rows, "x")
    return pair


def check_features(layer: str, x: Tensor, width: int, name: str = "x") -> None:
    """Refuse features that are not [rows, width].

    Raises:
        TypeError: names what is no tensor.
        ValueError: names both widths.
    """
    check_tensor(layer, x, name)
    if x.dim() != 2 or x.shape[1] != width:
        raise ValueError(
            f"{layer}: {name} has shape {list(x.shape)}, but the layer takes {width} features per"
            " row"
        )


def check_by_type(layer: str, **given: Any) -> None:
    """Refuse one tensor for all types.

    Raises:
        TypeError: names the argument.
    """
    for name, value in given.items():
        if isinstance(value, Tensor):
            raise TypeError(f"{layer}: {name} is a dictionary by type, got a tensor")


def refuse_other_arguments(layer: str, kwargs: dict[str, Any]) -> None:
    """Message passing arguments are accepted at the value the layers have.

    Raises:
        NotImplementedError: any other argument or value.
    """
    fixed = {"flow": "source_to_target", "node_dim": 0, "aggr": "add", "decomposed_layers": 1}
    for name, value in kwargs.items():
        if name not in fixed or fixed[name] != value:
            raise NotImplementedError(
                f"{layer} does not support {name}={value!r}"
                + (f"; it has {name}={fixed[name]!r}" if name in fixed else "")
            )
