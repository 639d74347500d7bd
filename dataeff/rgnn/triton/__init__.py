"""The GPU backend: programs as generated Triton, and the launches of the typed GEMM kernels."""
