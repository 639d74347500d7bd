"""Triton's kernels on the pretended device: interpreted when their stream comes to them.

Of the interpreter there is one, so that of several streams' kernels one runs at a time.
"""

import ctypes
import itertools
import sys
import threading

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from dataeff.kernels.interpreter import interpreted

_lock = threading.Lock()
_queued = {}  # what streams have yet to do, by the number that they are given
_numbers = itertools.count(1)
_runtime = ctypes.CDLL(None)
_runtime.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p] * 3


def host_view(given):
    """The same elements in the host's eyes; keeps no memory."""
    if not (isinstance(given, Tensor) and given.is_cuda):
        return given
    size = sum((n - 1) * step for n, step in zip(given.shape, given.stride(), strict=True)) + 1
    if not given.numel():
        return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype)
    memory = (ctypes.c_char * (size * given.element_size())).from_address(given.data_ptr())
    return torch.frombuffer(memory, dtype=given.dtype).as_strided(given.shape, given.stride())


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _reached(number):
    """On the thread of a stream."""
    work, again = _queued[number]
    try:
        with _lock:
            work()
    except BaseException as error:
        _runtime.pretended_cuda_break(f"a kernel: {error!r}".encode())
    if not again:
        del _queued[number]


def _queue(kernel, args, grid, kwargs):
    stream = torch.cuda.current_stream()
    views = [host_view(arg) for arg in args]
    module = sys.modules[kernel.fn.__module__]

    def work():
        with interpreted(module):
            getattr(module, kernel.fn.__name__)[grid](*views, **kwargs)

    number = next(_numbers)
    _queued[number] = work, torch.cuda.is_current_stream_capturing()
    _runtime.cudaLaunchHostFunc(stream.cuda_stream, _reached, number)


def install():
    """Once: from now on launches with tensors of the device are queued."""
    for kind in (JITFunction, InterpretedFunction):

        def run(self, *args, grid, warmup, of_host=kind.run, **kwargs):
            if any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
                return _queue(self, args, grid, kwargs)
            return of_host(self, *args, grid=grid, warmup=warmup, **kwargs)

        kind.run = run
