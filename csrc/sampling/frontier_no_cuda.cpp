// The CUDA sampler of a core that was compiled without nvcc.
#ifndef DATAEFF_WITH_CUDA

#include "errors.h"
#include "sampling/frontier.h"

namespace dataeff {

void count_frontier_cuda(const Frontier&, int64_t*, int, uintptr_t) { throw_no_cuda(); }

void choose_frontier_cuda(const Frontier&, const int64_t*, int64_t*, int, uintptr_t) {
  throw_no_cuda();
}

}  // namespace dataeff

#endif
