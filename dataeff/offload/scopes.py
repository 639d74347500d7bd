"""Which module of the model is running, by name: what a saved tensor is accounted to."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from types import CellType, FrameType, FunctionType
from typing import Any

import torch
from torch.jit._script import RecursiveScriptModule
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from dataeff.offload.exclude import Exclusions
from dataeff.offload.module_hook import ModuleHook

# What runs when a module is called, compiled or not: its frame knows which one it is.
_CALL = torch.nn.Module._wrapped_call_impl.__code__
# What saves the inputs of a checkpoint, before it calls the module that it is given.
_CHECKPOINT = inspect.unwrap(checkpoint).__code__
# What runs it again if it is reentrant, and then the backward of that.
_AGAIN = CheckpointFunction.backward.__code__


class Scopes:
    """Tells which module runs, and follows the calls of the model itself.

    Which module runs is read off the stack of calls, when somebody asks: most modules save little
    that anybody asks about, and two hooks on each would cost more than all the rest. The hooks on
    the model, which may call back, stay there until `remove`; while inactive they do nothing. They
    keep this object alive, but not the owner of the two methods that it is given.

    Args:
        model: whose modules are named.
        exclusions: is told the inputs of the model, and the parameters of each module when these
            are gathered only for its forward (sharded training).
        called: a method that is told what the model is called with; says whether that call is to be
            followed.
        returned: a method that is told that the model has returned, or failed.

    Attributes:
        num_compiled: modules that are compiled, each by itself.
        checkpointed: names of modules that a checkpoint of the model's own was seen to run.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        exclusions: Exclusions,
        called: Callable[[Any, Any], bool],
        returned: Callable[[], None],
    ) -> None:
        self._model, self._exclusions = model, exclusions
        self._called, self._returned = weakref.WeakMethod(called), weakref.WeakMethod(returned)
        self._names: dict[int, tuple[weakref.ref[torch.nn.Module], str]] = {}  # by `id`
        self._hooks: list[Any] = []  # on the model itself
        self._inner: list[Any] = []  # on the modules in it
        self._sharded = False
        self.num_compiled = 0
        self.checkpointed = set[str]()
        self.active = False

    def install(self) -> None:
        """Puts the hooks on and learns the names, once; modules added later have none.

        Nothing inside compiled modules has a name: what it saves belongs to these.
        """
        self.install_outermost()
        if not self._names:
            for name, module in outside_compiled(self._model):
                self._names[id(module)] = weakref.ref(module), name
                self.num_compiled += is_compiled(module)
            plain = (torch.Tensor, torch.nn.Parameter)
            self._sharded = any(type(p) not in plain for p in self._model.parameters())
        if self._sharded and not self._inner:
            for _, module in outside_compiled(self._model):
                if module is not self._model and takes_hooks(module):
                    hook = module.register_forward_pre_hook(ModuleHook(self._enter))
                    self._inner.append(hook)

    def install_outermost(self) -> None:
        """Puts the hooks on the model itself, once."""
        if not self._hooks and takes_hooks(self._model):
            enter, leave = ModuleHook(self._enter_model), ModuleHook(self._leave_model)
            self._hooks = [
                self._model.register_forward_pre_hook(enter, with_kwargs=True),
                self._model.register_forward_hook(leave, always_call=True),
            ]

    def remove_inner(self) -> None:
        """Takes the hooks off the modules in the model."""
        while self._inner:
            self._inner.pop().remove()

    def remove(self) -> None:
        """Takes the hooks off."""
        self.remove_inner()
        while self._hooks:
            self._hooks.pop().remove()

    @property
    def current(self) -> str:
        """Name of the innermost module that runs on this thread; "" outside and in the model.

        The inputs of a checkpoint are the module's that it runs, if it is given a module: one that
        is told to offload a block, or to plan for it, means these.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _CALL:
                name = self._name(frame.f_locals.get("self"))
                if name is not None:
                    return name
            elif frame.f_code is _CHECKPOINT:
                name = self._checkpointed(frame.f_locals.get("function"))
                if name is not None:
                    self.checkpointed.add(name)
                    return name
            frame = frame.f_back
        return ""

    @property
    def run_again(self) -> bool:
        """Whether backward, on this thread, runs again what it went back to, as a checkpoint does.

        A backward that keeps no graph saves nothing by itself: a function of somebody's turned
        gradients on in it. In one that keeps its graph, as that of gradients of gradients does,
        torch's own reentrant checkpoint is known.
        """
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _AGAIN:
            frame = frame.f_back
        return frame is not None

    def _checkpointed(self, function: Any) -> str | None:
        """Name of the module that a call of `function` runs: it, or the one whose method it is.

        What is often written as `lambda x: block(x)` has the block in a cell, or for a default;
        where it has all of the model, which part it runs cannot be told.
        """
        while isinstance(function, functools.partial):
            function = function.func
        if isinstance(function, FunctionType):
            names = {self._name(held) for held in _held(function)} - {None, ""}
            return names.pop() if len(names) == 1 else None
        return self._name(
            function
            if isinstance(function, torch.nn.Module)
            else getattr(function, "__self__", None)
        )

    def _name(self, module: Any) -> str | None:
        known = self._names.get(id(module))
        return known[1] if known is not None and known[0]() is module else None

    def expect(self, args: Any, kwargs: Any) -> None:
        """The model, or parts of it, are about to be called with these."""
        # While dynamo traces, nothing here may break its graph.
        if torch.compiler.is_compiling() or not self.active:
            return
        called = self._called()
        if called is None or not called(args, kwargs):
            return
        self._exclusions.set_inputs(args, kwargs)
        if self._sharded:
            self._exclusions.add_module(self._model)

    def _enter_model(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self.expect(args, kwargs)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        if self.active:
            self._exclusions.add_module(module)

    def _leave_model(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        returned = self._returned()
        if returned is not None:
            returned()


def _held(function: FunctionType) -> Iterator[Any]:
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    # A cell is empty until what it is of has a value.
    yield from (c.cell_contents for c in function.__closure__ or () if c != CellType())


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether the module is what `torch.compile(module)` or `module.compile()` leaves."""
    frame = sys.modules.get("torch._dynamo.eval_frame")  # only there once something is compiled
    wrapped = frame is not None and isinstance(module, frame.OptimizedModule)
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def takes_hooks(module: torch.nn.Module) -> bool:
    """Whether hooks on calls of the module can be set, and are run in eager mode."""
    return not (is_compiled(module) or isinstance(module, RecursiveScriptModule))


def outside_compiled(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """What `model.named_modules()` gives, but nothing within compiled modules."""
    within: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(within):
            continue
        yield name, module
        if is_compiled(module):
            within = (*within, f"{name}." if name else "")
