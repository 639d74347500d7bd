"""Activations saved for backward go to disk or host memory while forward runs, and come back."""

from dataeff.offload.activation_offload import ActivationOffload
from dataeff.offload.policy import SavedTensorInfo
from dataeff.offload.recompute import checkpoint
from dataeff.offload.report import OffloadReport

__all__ = [
    "ActivationOffload",
    "OffloadReport",
    "SavedTensorInfo",
    "checkpoint",
    "compile_backend",
]


def __getattr__(name: str) -> object:
    if name != "compile_backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dataeff.offload.compiled import compile_backend  # which loads the compiler

    return compile_backend
