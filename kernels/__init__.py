"""Triton kernels, installed as `dataeff.kernels`."""
