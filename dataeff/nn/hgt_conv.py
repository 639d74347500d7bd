"""HGT (Hu et al., arXiv 2003.01332), a drop-in for PyTorch Geometric's `HGTConv`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parameter import UninitializedParameter

from dataeff import rgnn
from dataeff.nn.arguments import check_by_type, check_features, check_tensor, refuse_other_arguments
from dataeff.nn.graphs import typed_graph_for
from dataeff.rgnn.batched import is_transformed
from dataeff.rgnn.constants import Arguments, constants_of
from dataeff.rgnn.graph_symbol import GraphSymbol
from dataeff.rgnn.symbols import Argument, Symbol, Value
from dataeff.rgnn.typed import TypedLayout

Metadata = tuple[list[str], list[tuple[str, str, str]]]
Maps = tuple[list[Tensor], list[Tensor]]


@rgnn.layer
def hgt(g, x, K, bk, Q, bq, V, bv, attend, message, prior, out, bias, skip=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, D103
    k, v = (rgnn.linear(g.node(x), W[g.ntype]) + b[g.ntype] for W, b in ((K, bk), (V, bv)))
    q = rgnn.linear(g.at_dst(x), Q[g.ntype]) + bq[g.ntype]
    y = _attended(g, k, q, v, attend, message, prior, out, bias)
    if skip is None:
        return y
    share = rgnn.sigmoid(skip[g.ntype])
    return share * y + (1.0 - share) * g.at_dst(x)


@rgnn.layer
def hgt_projected(g, k, q, v, attend, message, prior, out, bias):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, D103
    return _attended(g, k, q, v, attend, message, prior, out, bias)


def _attended(
    g: GraphSymbol,
    k: Symbol,
    q: Symbol,
    v: Symbol,
    attend: Argument,
    message: Argument,
    prior: Argument,
    out: Argument,
    bias: Argument,
) -> Value:
    """Sums of weighted messages, through gelu and the projection of each destination's type."""
    score = rgnn.dot(rgnn.linear(g.src(k), attend[g.etype]), g.dst(q)) * prior[g.etype]
    h = g.sum(rgnn.edge_softmax(score) * rgnn.linear(g.src(v), message[g.etype]))
    return (
        rgnn.linear(rgnn.reshape(rgnn.gelu(h), math.prod(h.type.shape)), out[g.ntype])
        + bias[g.ntype]
    )


class HGTConv(torch.nn.Module):
    r"""Heterogeneous graph transformer layer (arXiv 2003.01332, section 3).

    With :math:`\tau` the type of a node, r a relation and D the width of a head,

    .. math::
        \alpha_{ij} = \mathrm{softmax}_j\; p_r \, k_j W^{att}_r \cdot q_i / \sqrt{D}, \qquad
        x'_i = \sigma(s_\tau) A_\tau\, \mathrm{gelu}\Big(\sum_j \alpha_{ij}\, v_j W^{msg}_r\Big)
               + (1 - \sigma(s_\tau)) x_i

    where k, q and v are projections by node type, and the last term is there where widths agree.
    The softmax runs over the edges of all relations together. The parameters of a type that takes
    no part in a loss get zeros as their gradient, where PyTorch Geometric's get none: weight decay
    and momentum move them.

    Args:
        in_channels: input width, of each node type if they differ; -1 to take it from the first
            input.
        out_channels: output width.
        metadata: node types and (source, relation, destination) edge types.
        heads: attention heads.

    Raises:
        ValueError: heads do not divide `out_channels`.
        NotImplementedError: a message passing argument that this layer does not follow.
    """

    def __init__(
        self,
        in_channels: int | dict[str, int],
        out_channels: int,
        metadata: Metadata,
        heads: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        refuse_other_arguments(type(self).__name__, kwargs)
        if out_channels % heads:
            raise ValueError(f"{heads} heads do not divide {out_channels} channels")
        self.node_types, self.edge_types = metadata[0], [(a, b, c) for a, b, c in metadata[1]]
        if not isinstance(in_channels, dict):
            in_channels = dict.fromkeys(self.node_types, in_channels)
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.dst_node_types = {e[-1] for e in self.edge_types}
        width, num_types = out_channels // heads, heads * len(self.edge_types)
        self.kqv_lin = _Linears(in_channels, 3 * out_channels)
        self.out_lin = _Linears(dict.fromkeys(self.node_types, out_channels), out_channels)
        self.k_rel, self.v_rel = _Stacked(num_types, width), _Stacked(num_types, width)
        self.skip = torch.nn.ParameterDict({t: Parameter(torch.empty(1)) for t in self.node_types})
        self._priors = [_joined(e) for e in self.edge_types]
        self.p_rel = torch.nn.ParameterDict()
        for name in self._priors:  # one by one: all at once they would be sorted by name
            self.p_rel[name] = Parameter(torch.empty(1, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        for part in (self.kqv_lin, self.out_lin, self.k_rel, self.v_rel):
            part.reset_parameters()
        for value in (*self.skip.values(), *self.p_rel.values()):
            torch.nn.init.ones_(value)

    def forward(
        self,
        x_dict: Mapping[str, Tensor],
        edge_index_dict: Mapping[tuple[str, str, str], Tensor] | rgnn.Graph,
    ) -> dict[str, Tensor]:
        """Run the layer.

        Args:
            x_dict: features of each node type, [nodes of the type, its width].
            edge_index_dict: [2, num_edges] of each edge type (or a sparse adjacency
                [destinations, sources]), or `rgnn.Graph.from_typed` of them with the layer's
                `edge_types`, to build the index structures once.

        Returns:
            [destinations of the type, out_channels] for each node type that edges can lead to.

        Raises:
            TypeError: features of no types, or edges.
            KeyError: a node type or an edge type that the metadata does not have.
            ValueError: features whose number of rows or width does not fit.
            IndexError: a node number out of range.
        """
        check_by_type("HGTConv", x_dict=x_dict, edge_index_dict=edge_index_dict)
        unknown = set(x_dict) - set(self.node_types)
        if unknown:
            raise KeyError(f"node types {sorted(unknown)} are not in the metadata")
        for name, x in x_dict.items():
            check_tensor("HGTConv", x, f"x of {name!r}")
        graph = typed_graph_for(edge_index_dict, x_dict, self.node_types, self.edge_types)
        layout = graph.layout
        assert layout is not None
        self.kqv_lin.materialise(x_dict)
        for name, x in x_dict.items():
            width: int = self.kqv_lin.lins[name].in_features  # type: ignore[assignment]
            check_features("HGTConv", x, width, f"x of {name!r}")
        alike = self.kqv_lin.alike(x_dict)
        found = (self._joint if alike else self._by_type)(graph, layout, x_dict)
        known = self.dst_node_types
        return {name: rows for name, rows in found.items() if name in known and name in x_dict}

    def _joint(
        self, graph: rgnn.Graph, layout: TypedLayout, x_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The layer for features of one width."""
        x = layout.concatenate(x_dict)
        kqv, out_lin, skip, priors = self._sources(x.shape[-1] == self.out_channels)
        stacks = self.k_rel.weight, self.v_rel.weight

        def arguments() -> Arguments:
            weight, bias = _stacked(kqv)
            weights = weight.unflatten(2, (3, self.heads, -1)).unbind(2)
            biases = bias.unflatten(1, (3, self.heads, -1)).unbind(1)
            pairs = [value for pair in zip(weights, biases, strict=True) for value in pair]
            shares = torch.cat(skip) if skip else None
            return (*pairs, *self._relations(priors), *_stacked(out_lin), shares)

        if torch.compiler.is_compiling():
            made = arguments()
        else:
            parts = (*kqv[0], *kqv[1], *out_lin[0], *out_lin[1], *skip, *priors, *stacks)
            made = constants_of(self).of(parts, arguments)
        out: Tensor = hgt(graph, x, *made)
        return _by_type_of(layout, out)

    def _sources(self, skip: bool) -> tuple[Maps, Maps, list[Tensor], list[Tensor]]:
        """Maps of inputs and of outputs, shares of the input if it is added, and priors."""
        shares = [self.skip[name] for name in self.node_types] if skip else []
        return self.kqv_lin.maps(), self.out_lin.maps(), shares, self._all_priors()

    def _by_type(
        self, graph: rgnn.Graph, layout: TypedLayout, x_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The layer for features of several widths, or none for a type without nodes."""
        kqv = {t: self.kqv_lin.lins[t](x) for t, x in x_dict.items()}
        k, q, v = layout.concatenate(kqv).unflatten(1, (3, self.heads, -1)).unbind(1)
        maps = _stacked(self.out_lin.maps())
        out: Tensor = hgt_projected(graph, k, q, v, *self._relations(self._all_priors()), *maps)
        found = _by_type_of(layout, out)
        for name, x in x_dict.items():
            if x.shape[-1] == self.out_channels:
                share, rows = self.skip[name].sigmoid(), found[name]
                found[name] = share * rows + (1 - share) * x[: rows.shape[0]]
        return found

    def _all_priors(self) -> list[Tensor]:
        """Those of each relation, [1, heads]."""
        own = self.p_rel._parameters  # asking the module takes a microsecond each, for hundreds
        return [own[name] if name in own else self.p_rel[name] for name in self._priors]  # type: ignore[misc]

    def _relations(self, priors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of keys and of messages [relations, heads, D, D], and priors over sqrt(D)."""
        attend, message = (rel.by_relation(self.heads) for rel in (self.k_rel, self.v_rel))
        return attend, message, torch.cat(priors) / math.sqrt(self.out_channels // self.heads)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(-1, {self.out_channels}, heads={self.heads})"


def _by_type_of(layout: TypedLayout, out: Tensor) -> dict[str, Tensor]:
    """Results of each type, which may be written to: the backward of `hgt` reads none of them.

    Autograd lets nobody write to the results of an ordinary split, whose writes all would see.
    """
    if is_transformed():  # vmap knows no other split
        return layout.split(out)
    parts = torch.unsafe_split_with_sizes(out, layout.num_dst_nodes)
    return dict(zip(layout.node_types, parts, strict=True))


class _Linears(torch.nn.Module):
    """An affine map for each node type, under the names that PyTorch Geometric gives them."""

    def __init__(self, in_channels: Mapping[str, int], out_channels: int) -> None:
        super().__init__()
        self.lins = torch.nn.ModuleDict(
            {
                name: torch.nn.LazyLinear(out_channels)
                if width == -1
                else torch.nn.Linear(width, out_channels)
                for name, width in in_channels.items()
            }
        )

    def reset_parameters(self) -> None:
        for lin in self.lins.values():
            lin.reset_parameters()  # type: ignore[operator]

    def materialise(self, x_dict: Mapping[str, Tensor]) -> None:
        """Give maps of a width not known so far the width of these features."""
        for name, x in x_dict.items():
            lin = self.lins[name]
            if isinstance(lin, torch.nn.LazyLinear):
                weight: Any = lin.weight
                bias: Any = lin.bias
                if not isinstance(weight, UninitializedParameter):  # loaded from a state
                    check_features("HGTConv", x, weight.shape[1], f"x of {name!r}")
                # A state that PyTorch Geometric saved before the first run has biases of no value,
                # and no weights: it makes both at that run, and so does LazyLinear.
                elif not isinstance(bias, UninitializedParameter):
                    lin.bias = UninitializedParameter(device=bias.device, dtype=bias.dtype)  # type: ignore[call-arg]
                lin(x[:0])  # its hook makes the parameters

    def alike(self, x_dict: Mapping[str, Tensor]) -> bool:
        """Whether all types have features, of one width."""
        widths = {x.shape[-1] for x in x_dict.values()}
        return len(widths) == 1 and len(x_dict) == len(self.lins)

    def maps(self) -> Maps:
        """Weights [out, in] and biases [out] of each type."""
        lins: list[Any] = list(self.lins.values())
        return [n.weight for n in lins], [n.bias for n in lins]


class _Stacked(torch.nn.Module):
    """Square weights of every head and relation, [heads * relations, width, width]."""

    def __init__(self, num_types: int, width: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(num_types, width, width))

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        torch.nn.init.uniform_(self.weight, -bound, bound)

    def by_relation(self, heads: int) -> Tensor:
        """[relations, heads, width, width]."""
        split: Tensor = self.weight.unflatten(0, (heads, -1))
        return split.transpose(0, 1)


def _stacked(maps: Maps) -> tuple[Tensor, Tensor]:
    """Weights [types, in, out] and biases [types, out]."""
    weights, biases = maps
    return torch.stack(weights).mT, torch.stack(biases)


def _joined(edge_type: tuple[str, ...]) -> str:
    """The name of an edge type's parameter; a dot would end the name of a module."""
    return "__".join(edge_type).replace(".", "#")
