"""`rgnn.layer`: a Python function becomes a compiled, differentiable layer."""

from __future__ import annotations

import functools
import inspect
import itertools
import reprlib
import sys
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dataeff.rgnn.autograd import Apply, ApplyInForwardMode
from dataeff.rgnn.backend import choose
from dataeff.rgnn.batched import is_transformed, requires_grad
from dataeff.rgnn.digest import digest_of
from dataeff.rgnn.graph import Graph
from dataeff.rgnn.graph_symbol import GraphSymbol
from dataeff.rgnn.ir import Program
from dataeff.rgnn.plan import LAYERS, Plan, Request, plan_for, spec_of
from dataeff.rgnn.profile import statistics_of
from dataeff.rgnn.schedule import Choice
from dataeff.rgnn.symbols import Argument, Symbol, Value, emit
from dataeff.rgnn.tracer import LayerTypeError, RowCounts, Tracer
from dataeff.rgnn.verify import verify

_numbers = itertools.count()

# Row counts; relations, node types and whether edges came by type; widths; dtype; device.
ChoiceKey = tuple[str, int, int, bool, tuple[tuple[int, ...], ...], str, str]


def choice_key(graph: Graph, statistics: str, inputs: Sequence[Tensor]) -> ChoiceKey:
    """What a choice of `rgnn.tune` holds for: graphs of these statistics, tensors like these."""
    types = graph.num_relations, graph.num_node_types, graph.layout is not None
    widths = tuple(tuple(map(int, tensor.shape[1:])) for tensor in inputs)
    return (statistics, *types, widths, str(inputs[0].dtype), inputs[0].device.type)


class Call(NamedTuple):
    """A call of a layer: its tensors by name, under autocast already cast, and its constants."""

    layer: Layer
    graph: Graph
    tensors: dict[str, Tensor]
    statics: tuple[tuple[str, Any], ...]


_heard: list[Call] | None = None


@contextmanager
def hear_calls() -> Iterator[list[Call]]:
    """Lists the calls of layers, on any thread, while the block runs."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before


class Layer:
    """A layer function, compiled for the shapes and graphs it is called with.

    Calling it takes an `rgnn.Graph`, then the function's own arguments. Floating tensors become
    symbols; everything else (numbers, strings, None) is a constant of the trace. All tensors have
    one floating dtype and the graph's device; under `torch.autocast` they are cast to its dtype.
    It is differentiable once in every tensor. Called by another layer, with that one's `g` and
    values, it becomes a part of it. A layer is found again by its name when it is
    pickled, and a copy of it is itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = function.__name__
        names = list(inspect.signature(function).parameters)
        if not names:
            raise TypeError(f"layer {self.name} needs the graph as its first parameter")
        if names[0] == "self":
            raise TypeError(
                f"layer {self.name} is a method; write a function whose first parameter is the"
                " graph, and give it the module's parameters when you call it"
            )
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if several := [
            p for p in inspect.signature(function).parameters.values() if p.kind in kinds
        ]:
            raise TypeError(
                f"layer {self.name} takes {several[0]}; each of a layer's arguments has a name"
            )
        self.parameters = tuple(names[1:])
        self.defaults = {
            n: p.default
            for n, p in inspect.signature(function).parameters.items()
            if p.default is not inspect.Parameter.empty
        }
        self.choices: dict[ChoiceKey, Choice] = {}  # what `rgnn.tune` chose
        # Called where torch.compile traces a call, not traced: all that the function uses is there.
        self.code = torch.compiler.assume_constant_result(
            lambda: digest_of(self.function, f"{choose('cpu')}, {choose('cuda')}")
        )
        self.id = next(_numbers)
        LAYERS[self.id] = self

    def __repr__(self) -> str:
        return f"rgnn.layer {self.name}({', '.join(self.parameters)})"

    def __call__(self, graph: Graph, *args: Any, **kwargs: Any) -> Any:
        """Run the layer; [num_dst_nodes, ...] or whatever the function returns.

        Raises:
            LayerTypeError: an operation does not fit its operands, with the layer's line.
            TypeError: dtypes differ; an argument is missing, unknown, or no tensor nor constant.
            ValueError: a tensor has the wrong number of rows, or stands on another device.
        """
        if isinstance(graph, GraphSymbol):
            return self.function(graph, *args, **kwargs)
        transformed = is_transformed()
        if transformed and _must_leave_compiler():
            from dataeff.rgnn.uncompiled import call_outside

            return call_outside(self._run, graph, args, kwargs, transformed)
        return self._run(graph, args, kwargs, transformed)

    def _run(
        self, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any], transformed: bool
    ) -> Any:
        tensors, statics = self.bind(graph, args, kwargs)
        if _heard is not None:
            _heard.append(Call(self, graph, tensors, statics))
        names = tuple(tensors)
        inputs = list(tensors.values())
        wanted = _wanted(inputs, transformed) if torch.is_grad_enabled() else 0
        profile = code = None
        if torch.compiler.is_compiling():
            profile, code = graph.profile, self.code()
        else:
            graph.sorted_for(*inputs)
        choice = self.choice_for(graph, inputs) if self.choices else None
        spec = spec_of(names, statics, profile, graph.layout is not None, choice, code)
        sizes = list(graph.sizes)
        forward_mode = _in_forward_mode()
        if wanted == 0 and not forward_mode:
            found, _ = torch.ops.dataeff.rgnn_forward(inputs, graph.token, self.id, spec, sizes, 0)
            outputs = tuple(found)
        else:
            function = ApplyInForwardMode if forward_mode else Apply
            result: tuple[Any, ...] = function.apply(
                graph.token, self.id, spec, sizes, wanted, *inputs
            )  # type: ignore[no-untyped-call]
            outputs = result[: result[-1]]
            _keep_until_backward(outputs[0], graph, self)
        return outputs[0] if len(outputs) == 1 else outputs

    def choice_for(self, graph: Graph, inputs: Sequence[Tensor]) -> Choice | None:
        """What `rgnn.tune` chose for graphs like this one and tensors like these, if it did."""
        compiling = torch.compiler.is_compiling()
        statistics = graph.profile if compiling else statistics_of(graph.sizes)
        return self.choices.get(choice_key(graph, statistics, inputs))

    def __reduce__(self) -> str:
        return str(self.__qualname__)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return self

    def bind(
        self, graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Tensor], tuple[tuple[str, Any], ...]]:
        """Sort the arguments of a call into tensors and constants."""
        if not isinstance(graph, Graph):
            raise TypeError(
                f"{self.name} takes an rgnn.Graph first, got {type(graph).__name__}; make one of"
                " edges with rgnn.Graph(edge_index, edge_type, num_nodes=...)"
            )
        if len(args) > len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, got {len(args)}")
        given = dict(zip(self.parameters, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in self.parameters:
                raise TypeError(f"{self.name} got an unexpected or repeated argument {name!r}")
            given[name] = value
        tensors: dict[str, Tensor] = {}
        statics: list[tuple[str, Any]] = []
        for name in self.parameters:
            value = given[name] if name in given else self.defaults.get(name, inspect._empty)
            if value is inspect._empty:
                raise TypeError(f"{self.name} misses argument {name!r}")
            if isinstance(value, Tensor):
                tensors[name] = _autocast(value)
            else:
                statics.append((name, _constant(self.name, name, value)))
        _check_tensors(self.name, tensors, graph)
        return tensors, tuple(statics)

    def trace(
        self, shapes: dict[str, tuple[int, ...]], statics: dict[str, Any], rows: RowCounts
    ) -> Program:
        """The inter-operator program of this layer for these shapes; inputs in argument order."""
        tracer = Tracer(shapes, rows)
        arguments = {name: Argument(tracer, name) for name in shapes}
        result = self.function(GraphSymbol(tracer), **arguments, **statics)
        values = list(_returned(tracer, self.name, result))
        return verify(tracer.builder.program(v.id for v in values))

    def plan(self, graph: Graph, *args: Any, **kwargs: Any) -> Plan:
        """The compiled plan of a call with these arguments, with gradients of every tensor."""
        tensors, statics = self.bind(graph, args, kwargs)
        choice = self.choice_for(graph, list(tensors.values()))
        spec = spec_of(tuple(tensors), statics, None, graph.layout is not None, choice)
        wanted = (1 << len(tensors)) - 1
        return plan_for(
            Request.of(self.id, spec, list(tensors.values()), list(graph.sizes), wanted)
        )

    def explain(self, graph: Graph, *args: Any, **kwargs: Any) -> str:
        """What the compiler made of a call: programs after each pass, kernels, bytes and flops."""
        from dataeff.rgnn.explain import explain

        return explain(self, graph, args, kwargs)


def layer(function: Callable[..., Any]) -> Layer:
    """Compile a function of the layer language.

    ```python
    @rgnn.layer
    def rgcn(g, x, W):
        return g.sum(rgnn.linear(g.src(x), W[g.etype]))
    ```
    """
    return Layer(function)


def _constant(layer: str, name: str, value: Any) -> Any:
    """A constant argument, which is written into the call's spec and read back."""
    if torch.compiler.is_compiling() and type(value) in (int, float):
        from torch.fx.experimental.symbolic_shapes import guard_scalar

        value = guard_scalar(value)  # numbers are symbols under dynamic=True: compile for this one
    if type(value) in (str, int, bool, type(None)) or (type(value) is float and isfinite(value)):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _constant(layer, name, value.item())
    try:
        if literal_eval(repr(value)) == value:
            return value
    except (ValueError, SyntaxError):
        pass
    raise TypeError(
        f"{layer}: argument {name} is {reprlib.repr(value)}, of type {type(value).__name__};"
        " what is no tensor is None, text, a finite number, or a tuple, list or dictionary of those"
    )


def _autocast(tensor: Tensor) -> Tensor:
    """The argument in the dtype that `torch.autocast` asks for; float64 stays, as in torch."""
    device = tensor.device.type
    # torch.compile of torch 2.10 cannot trace the question whether a device knows autocast.
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point():
        return tensor
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(device))


def _must_leave_compiler() -> bool:
    """Whether a transformed call would be traced in vain.

    What torch.compile traces within a transform differentiates operators, not the autograd function
    around them; and where it gave a transform up, it still traces all that is called within.
    """
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return "torch._dynamo" in sys.modules


def _wanted(inputs: list[Tensor], transformed: bool) -> int:
    """A bit for each argument of which a gradient may be asked for."""
    wanted = 0
    for position, tensor in enumerate(inputs):
        if tensor.requires_grad or (transformed and requires_grad(tensor)):
            wanted |= 1 << position
    return wanted


def _in_forward_mode() -> bool:
    """Whether arguments may carry tangents, which only the autograd function refuses."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _keep_until_backward(output: Tensor, graph: Graph, layer: Layer) -> None:
    """Backward finds graph and layer by their numbers, so the autograd node holds on to them."""
    if not torch.compiler.is_compiling() and output.grad_fn is not None:
        node: Any = output.grad_fn  # `metadata` is a dictionary, whatever the stub says
        node.metadata["graph"], node.metadata["layer"] = graph, layer


def _check_tensors(name: str, tensors: dict[str, Tensor], graph: Graph) -> None:
    if not tensors:
        raise TypeError(f"{name} got no tensor")
    first = next(iter(tensors))
    dtype = tensors[first].dtype
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: argument {key} is {tensor.dtype}; layers compute with floats")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: argument {key} must be dense, got {tensor.layout}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: argument {key} is {tensor.dtype}, but {first} is {dtype}")
        if tensor.device != graph.device:
            raise ValueError(
                f"{name}: argument {key} is on {tensor.device}, but the graph on {graph.device}"
            )


def _returned(tracer: Tracer, name: str, result: Any) -> Iterator[Value]:
    """What a layer returns, edge values in the order of `edge_index`."""
    for value in result if isinstance(result, tuple) else (result,):
        if not isinstance(value, Symbol):
            raise LayerTypeError(
                f"layer {name} returned {value!r}; a layer returns a value, or a tuple of values"
            )
        if not isinstance(value, Value):
            raise LayerTypeError(f"layer {name} returned {value!r} unchanged")
        if value.type.domain == "edge":
            value = emit(tracer, "sum", value.id, attrs=("edge.given",))
        elif value.type.domain in ("src_pair", "dst_pair"):
            raise LayerTypeError(
                f"layer {name} returned {value!r}, whose rows only the compiler knows:"
                " g.sum reduces them to nodes"
            )
        yield value
