"""The pytest plugin that gives torch its pretended device before any test is read."""

import contextlib
import ctypes
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch

from build import ARITHMETIC, CORE

folder = Path(os.environ["PRETENDED_CUDA"])
torch.cuda.init()
torch.backends.cudnn.enabled = False  # its kernels are no operators
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of operators that are replaced
    ctypes.CDLL(str(folder / ARITHMETIC)).pretended_cuda_install()
spec = importlib.util.spec_from_file_location("dataeff._core", folder / CORE)
sys.modules["dataeff._core"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["dataeff._core"])
runtime = ctypes.CDLL(None)
runtime.pretended_cuda_seed(ctypes.c_uint64(int(os.environ.get("PRETENDED_CUDA_SEED", "0"))))

with contextlib.suppress(ImportError):  # Triton has no build for this platform
    import triton_launches

    triton_launches.install()


def pytest_unconfigure():
    torch.cuda.synchronize()  # or streams would call an interpreter that is gone
