"""`torch.compile` of a whole model whose saved values leave memory one by one.

Autograd sees a compiled region as one function: it packs all that the region saves when its forward
has ended, and unpacks all of it before its backward begins, so hooks on saved tensors save nothing
there. Here the graphs themselves say when a value leaves and when it is back: after AOTAutograd has
cut the joint graph in two, each value that forward saves is given to `dataeff::leave` behind its
last use, which returns a ticket of 8 bytes; autograd saves that instead, and `dataeff::come_back`
turns it into the value again where backward first uses it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx import GraphModule, Node

from dataeff.offload import tickets
from dataeff.offload.disk import SMALLEST_NBYTES

# What leaves is still read (and written to disk) when the graph has used it for the last time, and
# what comes back may be wanted again: no other value may take its memory.
_INDUCTOR = {"allow_buffer_reuse": False, "inplace_buffers": False}


def compile_backend(
    gm: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend Inductor, with what a graph saves offloaded value by value.

        model = torch.compile(model, backend=compile_backend)
        with ActivationOffload(model, "/nvme") as offload: ...

    Names of modules are lost in a graph, so `policy` is "all" or a function of `storage_nbytes`.
    Without an active offload all values stay in memory. The results are Inductor's own.

    Args:
        gm: what dynamo has captured.
        example_inputs: what it is called with.
        options: Inductor's, as `torch.compile(..., options=...)` takes them.
    """
    patches = {**(options or {}), **_INDUCTOR, "custom_partitioner_fn": Partitioner()}
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    return compiled  # type: ignore[no-any-return]


class Partitioner(CustomPartitionerFn):
    """Torch's own cut of a joint graph, and then `move_saved`."""

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        """The forward graph and the backward graph."""
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)
        move_saved(forward, backward, kwargs["num_fwd_outputs"])
        return forward, backward

    def uuid(self) -> Any:
        """What Inductor's cache of compiled graphs tells this pass by."""
        return get_hash_for_files((__file__, tickets.__file__))


def move_saved(forward: GraphModule, backward: GraphModule, num_fwd_outputs: int) -> None:
    """Replaces what `forward` saves for `backward` by tickets, in both.

    Inputs, what the caller is given, and small values are left alone.

    Args:
        forward: its outputs are `num_fwd_outputs` results, then what is saved.
        backward: has an input of the same name for each that is saved.
        num_fwd_outputs: how many results there are.
    """
    end = next(iter(forward.graph.find_nodes(op="output")))
    outputs = list(end.args[0])
    last_uses = _last_uses(forward)
    held = {_storage(node) for node in forward.graph.find_nodes(op="placeholder")}
    held |= {_storage(node) for node in outputs[:num_fwd_outputs] if isinstance(node, Node)}
    inputs = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    sizes = _Sizes(backward)
    for i, saved in enumerate(outputs[num_fwd_outputs:], num_fwd_outputs):
        value: Any = saved.meta.get("val")
        if not isinstance(value, torch.Tensor) or _storage(saved) in held or _is_small(value):
            continue
        ticket = inputs[saved.name]
        if not ticket.users or not _come_back(backward, ticket, value, sizes):
            continue
        with forward.graph.inserting_after(last_uses[_storage(saved)]):
            outputs[i] = forward.graph.call_function(torch.ops.dataeff.leave.default, (saved,))
        with _fake_mode(value):
            outputs[i].meta["val"] = ticket.meta["val"] = tickets.blank()
    end.args = (tuple(outputs), *end.args[1:])
    for graph in (forward, backward):
        graph.graph.lint()
        graph.recompile()


def _come_back(backward: GraphModule, ticket: Node, value: Any, sizes: _Sizes) -> bool:
    """Has `value` come back before its first use; false where its sizes cannot be said there."""
    users = dict.fromkeys(ticket.users)
    first = next(node for node in backward.graph.nodes if node in users)
    with backward.graph.inserting_before(first):
        size = [sizes.node(length) for length in value.size()]
        stride = [sizes.node(step) for step in value.stride()]
        if None in size or None in stride:
            return False
        layout = (ticket, size, stride, value.dtype, value.device)
        back = backward.graph.call_function(torch.ops.dataeff.come_back.default, layout)
    back.meta["val"] = value
    for user in users:
        user.replace_input_with(ticket, back)
    return True


class _Sizes:
    """Sizes as a graph can say them: numbers, its inputs that are numbers, sums and products."""

    def __init__(self, module: GraphModule) -> None:
        self._graph = module.graph
        self._symbols: dict[Any, Node] = {}
        for node in module.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self._symbols[value.node.expr] = node

    def node(self, size: int | torch.SymInt) -> int | Node | None:
        """What stands for `size`; None where nothing does."""
        return size if isinstance(size, int) else self._of(size.node.expr)

    def _of(self, expr: Any) -> int | Node | None:
        if expr.is_Integer:
            return int(expr)
        join = operator.mul if expr.is_Mul else operator.add if expr.is_Add else None
        if expr in self._symbols or join is None:
            return self._symbols.get(expr)
        parts = [self._of(part) for part in expr.args]
        if None in parts:
            return None
        whole = parts[0]
        for part in parts[1:]:
            value = join(_number(whole), _number(part))
            whole = self._graph.call_function(join, (whole, part))
            whole.meta["val"] = value
        return whole


def _number(size: int | Node | None) -> Any:
    return size.meta["val"] if isinstance(size, Node) else size


def _last_uses(module: GraphModule) -> dict[int | None, Node]:
    """By storage, the last node that makes or reads a view of it; the graph's output is none."""
    last: dict[int | None, Node] = {}
    for node in module.graph.nodes:
        if node.op != "output":
            for read in (node, *node.all_input_nodes):
                last[_storage(read)] = node
    return last


def _fake_mode(value: Any) -> AbstractContextManager[Any]:
    return value.fake_mode  # type: ignore[no-any-return]


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _is_small(value: torch.Tensor) -> bool:
    nbytes = value.numel() * value.element_size()
    return isinstance(nbytes, int) and nbytes < SMALLEST_NBYTES
