"""What the drop-ins' constructors have in common: optional parameters, refused arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter


def optional(module: torch.nn.Module, name: str, present: bool, *shape: int) -> None:
    """Register a parameter that may be absent."""
    module.register_parameter(name, Parameter(torch.empty(shape)) if present else None)


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
