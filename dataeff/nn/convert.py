"""`convert`: swap the relational layers of PyTorch Geometric in a model for the compiled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from dataeff.nn.hgt_conv import HGTConv
from dataeff.nn.rgat_conv import RGATConv
from dataeff.nn.rgcn_conv import RGCNConv


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        swapped: (name in the model, what it was, what it is).
        left: (name in the model, what it is, why it stays).
    """

    swapped: list[tuple[str, str, str]] = field(default_factory=list)
    left: list[tuple[str, str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{name}: {old} -> {new}" for name, old, new in self.swapped]
        lines += [f"{name}: {kind} stays: {reason}" for name, kind, reason in self.left]
        return "\n".join(lines) or "nothing to convert"


def convert(model: nn.Module) -> Conversion:
    """Swap PyTorch Geometric's relational layers inside a model, in place.

    `RGCNConv`, `FastRGCNConv`, `RGATConv` and `HGTConv` become those of `dataeff.nn`, with the same
    parameter objects, so that optimisers and tied weights stay as they are.

    ```python
    print(dataeff.nn.convert(model))  # conv1: RGCNConv -> RGCNConv(16, 32, num_relations=8)
    ```

    Args:
        model: a model that holds such layers, at any depth.

    Returns:
        What was swapped, and which layers stay as they are, with the reason.

    Raises:
        TypeError: it is no module.
        ValueError: the model itself is such a layer, and nothing holds it; see `from_pyg`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model is a torch.nn.Module, got {type(model).__name__}")
    if _maker(model) is not None:
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot become another object in"
            " place; use dataeff.nn.from_pyg(model)"
        )
    report = Conversion()
    made: dict[nn.Module, nn.Module] = {}
    for name, parent, key, layer, traced in list(_layers(model, "", False)):
        kind = type(layer).__name__
        if layer not in made:
            reason = _obstacle(layer, traced)
            if reason is not None:
                report.left.append((name, kind, reason))
                continue
            try:
                made[layer] = from_pyg(layer)
            except (NotImplementedError, ValueError) as error:
                report.left.append((name, kind, str(error)))
                continue
        parent._modules[key] = made[layer]
        report.swapped.append((name, kind, repr(made[layer])))
    return report


def from_pyg(layer: nn.Module) -> nn.Module:
    """The compiled counterpart of one layer of PyTorch Geometric, sharing its parameters.

    Raises:
        TypeError: there is no counterpart.
        NotImplementedError: the layer has an option that the counterpart does not follow.
        ValueError: the layer's widths are not known yet, so that it has no parameters to share.
    """
    make = _maker(layer)
    if make is None:
        raise TypeError(f"no compiled layer takes the place of {type(layer).__qualname__}")
    if any(isinstance(p, UninitializedParameter) for p in layer.parameters()):
        raise ValueError("it has parameters of unknown shape; run it once first")
    _refuse_options(layer)
    with torch.device("meta"):  # its own parameters are replaced at once
        new = make(layer)
    theirs = dict(layer.named_parameters(remove_duplicate=False))
    for name, _ in list(new.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        new.get_submodule(owner)._parameters[leaf] = theirs.pop(name)
    added = sorted(theirs) + [name for name, _ in layer.named_buffers()]
    if added:
        raise NotImplementedError(f"it has {', '.join(added)}, added to it")
    return new.train(layer.training)


def _layers(
    module: nn.Module, prefix: str, traced: bool
) -> Iterator[tuple[str, nn.Module, str, nn.Module, bool]]:
    """(full name, holder, key, layer, inside a traced graph) of each layer of PyG's."""
    traced = traced or isinstance(module, torch.fx.GraphModule)
    for key, child in module._modules.items():
        if child is None:
            continue
        if _maker(child) is not None:
            yield prefix + key, module, key, child, traced
        else:
            yield from _layers(child, f"{prefix}{key}.", traced)


def _obstacle(layer: Any, traced: bool) -> str | None:
    """Why a layer must stay, from where it is and what hangs on it."""
    if traced:
        return (
            "it is inside a traced graph (to_hetero or torch.fx), which calls each layer with"
            " arguments of its own; to_hetero adds up what its own kind returns, and no other:"
            " hold compiled layers in a torch_geometric.nn.HeteroConv instead"
        )
    if type(layer).__module__.partition(".")[0] != "torch_geometric":
        return "it is a subclass, which may compute something else"
    if any(hooks for name, hooks in vars(layer).items() if name.endswith("_hooks")):
        return "hooks are registered on it"
    if any(isinstance(m, nn.utils.parametrize.ParametrizationList) for m in layer.modules()):
        return "its parameters are parametrised"
    if own := sorted(name for name in vars(layer) if callable(getattr(type(layer), name, None))):
        return f"{', '.join(own)} of this one were replaced"
    if getattr(layer, "_explain", None):
        return "it is being explained"
    return None


def _refuse_options(layer: Any) -> None:
    fixed = {"flow": "source_to_target", "node_dim": 0, "decomposed_layers": 1}
    if _maker(layer) is _hgt:
        fixed["aggr"] = "add"
    for name, value in fixed.items():
        have = getattr(layer, name)
        if have != value:
            raise NotImplementedError(f"it has {name}={have!r}, the compiled layer {value!r}")


def _kind(layer: nn.Module) -> str | None:
    """The name of the PyTorch Geometric layer that this is, or is a subclass of."""
    for base in type(layer).__mro__:
        if base.__module__.startswith("torch_geometric.nn.conv") and base.__name__ in _MAKERS:
            return base.__name__
    return None


def _maker(layer: nn.Module) -> Callable[[Any], nn.Module] | None:
    kind = _kind(layer)
    return None if kind is None else _MAKERS[kind]


def _rgcn(layer: Any) -> nn.Module:
    return RGCNConv(
        layer.in_channels,
        layer.out_channels,
        layer.num_relations,
        num_bases=layer.num_bases,
        num_blocks=layer.num_blocks,
        aggr=layer.aggr,
        root_weight=layer.root is not None,
        is_sorted=layer.is_sorted,
        bias=layer.bias is not None,
    )


def _rgat(layer: Any) -> nn.Module:
    names = "num_bases num_blocks mod attention_mechanism attention_mode heads dim concat"
    names += " negative_slope dropout edge_dim aggr"
    options = {name: getattr(layer, name) for name in names.split()}
    sizes = layer.in_channels, layer.out_channels, layer.num_relations
    return RGATConv(*sizes, **options, bias=layer.bias is not None)


def _hgt(layer: Any) -> nn.Module:
    metadata = (layer.node_types, layer.edge_types)
    return HGTConv(layer.kqv_lin.in_channels, layer.out_channels, metadata, layer.heads)


_MAKERS: dict[str, Callable[[Any], nn.Module]] = {
    "RGCNConv": _rgcn,
    "FastRGCNConv": _rgcn,
    "RGATConv": _rgat,
    "HGTConv": _hgt,
}
