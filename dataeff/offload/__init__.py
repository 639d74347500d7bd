"""Activations saved for backward go to disk or host memory while forward runs, and come back."""

from dataeff.offload.activation_offload import ActivationOffload
from dataeff.offload.policy import SavedTensorInfo
from dataeff.offload.recompute import checkpoint
from dataeff.offload.report import OffloadReport

__all__ = ["ActivationOffload", "OffloadReport", "SavedTensorInfo", "checkpoint"]
