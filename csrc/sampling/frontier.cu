#include <cuda_runtime.h>

#include <algorithm>

#include "memory/cuda_device.cuh"
#include "sampling/frontier.h"

namespace dataeff {
namespace {

constexpr int kBlockThreads = 256;
// Enough threads to have a bus full of requests; a thread takes several nodes beyond that.
constexpr int64_t kMaxBlocks = 512;

__global__ void __launch_bounds__(kBlockThreads)
    count_kernel(const Frontier frontier, int64_t* counts) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < frontier.size; i += step)
    counts[i] = count_column(frontier, i);
}

__global__ void __launch_bounds__(kBlockThreads)
    choose_kernel(const Frontier frontier, const int64_t* offsets, int64_t* places) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < frontier.size; i += step)
    choose_column(frontier, i, places + offsets[i]);
}

dim3 grid_of(const Frontier& frontier) {
  const int64_t blocks = (frontier.size + kBlockThreads - 1) / kBlockThreads;
  return dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
}

}  // namespace

void count_frontier_cuda(const Frontier& frontier, int64_t* counts, int device, uintptr_t stream) {
  if (frontier.size == 0) return;
  const CudaDevice use(device);
  count_kernel<<<grid_of(frontier), kBlockThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      frontier, counts);
  check_cuda(cudaGetLastError(), "launching the sampler's count");
}

void choose_frontier_cuda(const Frontier& frontier, const int64_t* offsets, int64_t* places,
                          int device, uintptr_t stream) {
  if (frontier.size == 0) return;
  const CudaDevice use(device);
  choose_kernel<<<grid_of(frontier), kBlockThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      frontier, offsets, places);
  check_cuda(cudaGetLastError(), "launching the sampler's choice");
}

}  // namespace dataeff
