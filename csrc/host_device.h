// Functions that host code and kernels share, so that the host can test what a kernel computes.
#pragma once

#ifdef __CUDACC__
#define DATAEFF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DATAEFF_HOST_DEVICE inline
#endif
