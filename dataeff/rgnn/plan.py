"""Plans: what one call signature of a layer compiles to, found again by an immutable request."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dataeff.rgnn.autodiff import differentiate, gradient_input
from dataeff.rgnn.backend import Runner
from dataeff.rgnn.ir import Program
from dataeff.rgnn.passes.pipeline import optimise, optimise_joint
from dataeff.rgnn.split import split
from dataeff.rgnn.tracer import RowCounts
from dataeff.rgnn.view import View

if TYPE_CHECKING:
    from dataeff.rgnn.layer import Layer

LAYERS: list[Layer] = []


@dataclass(frozen=True)
class Request:
    """Everything a plan depends on."""

    layer_id: int
    spec: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    device: str
    sizes: tuple[int, ...]
    wanted: int

    @classmethod
    def of(
        cls, layer_id: int, spec: str, inputs: Sequence[Tensor], sizes: Sequence[int], wanted: int
    ) -> Request:
        """The request that an operator call stands for."""
        return cls(
            layer_id,
            spec,
            tuple(tuple(int(n) for n in t.shape) for t in inputs),
            inputs[0].dtype,
            inputs[0].device.type,
            tuple(int(s) for s in sizes),
            wanted,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensor arguments."""
        names: tuple[str, ...] = literal_eval(self.spec)[0]
        return names

    @property
    def statics(self) -> dict[str, Any]:
        """Constant arguments."""
        return dict(literal_eval(self.spec)[1])


class Plan:
    """Programs of a request, ready to run.

    Attributes:
        traced: the program as the layer function wrote it.
        stages: (pass name, program after it) pairs, forward and joint.
        forward, backward: what runs.
        sizes: rows of each domain, with as many types as the layer's parameters have.
    """

    def __init__(self, request: Request, disabled: frozenset[str] = frozenset()) -> None:
        self.request = request
        layer = LAYERS[request.layer_id]
        names, node_counts = request.names, request.sizes
        rows = RowCounts(*node_counts[:3], *node_counts[5:])
        shapes = dict(zip(names, request.shapes, strict=True))
        self.traced = layer.trace(shapes, request.statics, rows)
        self.sizes = (*node_counts[:5], *_type_counts(layer.name, self.traced, shapes, node_counts))
        self.stages: list[tuple[str, Program]] = [("traced", self.traced)]
        program = optimise(self.traced, self.sizes, self.stages, disabled)
        wanted = [n for i, n in enumerate(names) if request.wanted >> i & 1]
        self.used = {str(op.attrs[0]) for op in program.inputs}
        self.wanted = [n for n in wanted if n in self.used]
        self.order = {str(op.attrs[0]): k for k, op in enumerate(program.inputs)}
        joint = program
        if self.wanted:
            joint = differentiate(program, self.wanted)
            self.stages.append(("differentiate", joint))
            joint = optimise_joint(joint, self.stages, disabled)
        halves = split(joint, len(program.outputs))
        self.num_outputs = halves.num_outputs
        self.forward, self.backward = halves.forward, halves.backward
        self.kept_outputs = halves.kept_outputs
        self.forward_runner = Runner(self.forward, request.dtype, request.device)
        self.backward_runner = (
            Runner(self.backward, request.dtype, request.device) if self.backward else None
        )

    def run_forward(
        self, view: View, inputs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the values that backward needs besides inputs and outputs."""
        named = dict(zip(self.request.names, inputs, strict=True))
        values = self.forward_runner(view, named)
        return values[: self.num_outputs], values[self.num_outputs :]

    def run_backward(
        self,
        view: View,
        grads: Sequence[Tensor],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> list[Tensor]:
        """Gradients of the wanted inputs, in argument order."""
        assert self.backward_runner is not None
        named = dict(zip(self.request.names, inputs, strict=True))
        given = dict(named)
        given |= {gradient_input(k): g for k, g in enumerate(grads)}
        given |= {f"output:{k}": v for k, v in enumerate(outputs)}
        given |= {f"saved:{k}": v for k, v in enumerate(saved)}
        found = dict(
            zip(
                sorted(self.wanted, key=lambda n: self.order[n]),
                self.backward_runner(view, given),
                strict=True,
            )
        )
        names = [n for i, n in enumerate(self.request.names) if self.request.wanted >> i & 1]
        return [found[n] if n in found else torch.zeros_like(named[n]) for n in names]


def _type_counts(
    layer: str, program: Program, shapes: dict[str, tuple[int, ...]], sizes: tuple[int, ...]
) -> tuple[int, int]:
    """Rows of the relation and node type domains: those of the layer's parameters."""
    counts = {"etype": sizes[5], "ntype": sizes[6]}
    for domain in counts:
        found = {
            str(op.attrs[0]): shapes[str(op.attrs[0])][0]
            for op in program.inputs
            if op.type.domain == domain
        }
        if len(set(found.values())) > 1:
            raise ValueError(f"{layer}: parameters picked by {domain} differ in rows: {found}")
        counts[domain] = next(iter(found.values()), counts[domain])
    return counts["etype"], counts["ntype"]


_PLANS: dict[Request, Plan] = {}


def plan_for(request: Request) -> Plan:
    """The plan of a request, compiled at its first use."""
    if request not in _PLANS:
        _PLANS[request] = Plan(request)
    return _PLANS[request]
