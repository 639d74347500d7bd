// The runtime's own interface, with kernels of csrc/ that run on the host when their stream comes
// to them. `launch` stands for `kernel<<<...>>>(...)`.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#undef __launch_bounds__
#define __launch_bounds__(...)

#include "../../cuda_on_host/warp.h"
#include "../cudart.h"

namespace cuda_on_host {

template <typename Body>
void launch(dim3 grid, dim3 block, size_t, cudaStream_t stream, Body body) {
  if (!fits(grid, block)) return pretended_cuda::refuse(cudaErrorInvalidConfiguration);
  pretended_cuda::enqueue(stream, [=] { run_grid(grid, block, body); });
}

}  // namespace cuda_on_host
