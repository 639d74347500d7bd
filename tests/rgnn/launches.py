"""Triton's own way from a launch to a GPU, up to the GPU: a driver of a device that runs nothing.

Arguments are bound and specialised, and kernels compiled, as for an sm_90; what would be launched
is written down. Tensors are on the CPU, and keep what they held.
"""

import contextlib
import gc
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import max_shared_mem
from triton.runtime.jit import JITFunction

from dataeff.rgnn import gemm
from dataeff.rgnn.triton import backend as triton_backend
from dataeff.rgnn.triton import gemm as gemm_triton

SHARED_NBYTES = 232_448  # of a block of an sm_90


class Utils:
    """What the driver knows of the device, and how it loads machine code."""

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_NBYTES, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name, kernel, shared, device):
        return object(), 1, 32, 0, 1024

    def unload_module(self, *loaded):
        pass


class Driver:
    """Takes launches.

    Attributes:
        launched: (kernel, grid) of each, in order.
    """

    def __init__(self):
        self.launched = []
        self.utils = Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, *rest):
            assert 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16, (x, y, z)
            self.launched.append((source.fn.fn.__name__, (x, y, z)))

        return launch


@contextlib.contextmanager
def launching(monkeypatch, compiles=True):
    """Launches of layers go to a `Driver`, which the block gets.

    `compiles`: whether kernels are compiled too; else each launch that would compile one is written
    down in `driver.compiled` as (kernel, key), as often as it comes.
    """
    driver, kept = Driver(), {}
    driver.compiled = []

    def record(function, key, *rest, **options):
        driver.compiled.append((function.fn.__name__, key))
        return SimpleNamespace(
            launch_metadata=lambda *given: None,
            run=driver.launcher_cls(SimpleNamespace(fn=function), None),
            function=None,
            packed_metadata=None,
        )

    def no_interpreter(device, module):
        for value in vars(module).values():  # compiled for another driver before
            if isinstance(value, JITFunction) and value not in kept:
                kept[value] = value.device_caches.copy()
                value.device_caches.clear()
        return contextlib.nullcontext()

    with monkeypatch.context() as patched:
        patched.setenv("DATAEFF_RGNN_BACKEND", "triton")
        patched.setattr(gemm, "_backend", lambda x: gemm_triton)
        patched.setattr(triton_backend, "_launching_on", no_interpreter)
        if not compiles:
            patched.setattr(JITFunction, "_do_compile", record)
        from dataeff.kernels import typed_gemm

        no_interpreter(None, typed_gemm)
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(driver)
        max_shared_mem.cache_clear()
        try:
            yield driver
        finally:
            max_shared_mem.cache_clear()
            for function, caches in kept.items():
                function.device_caches.clear()
                function.device_caches.update(caches)
            gc.collect()  # Triton 3.9 asks the driver to unload what is let go
            triton.runtime.driver._active = before
