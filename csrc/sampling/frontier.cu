#include <cuda_runtime.h>

#include <algorithm>

#include "memory/cuda_device.cuh"
#include "sampling/frontier.h"
#include "sampling/warp_pick.cuh"

namespace dataeff {
namespace {

constexpr int kBlockThreads = WeighingWarpPicks::kMaxThreads;
constexpr int kLanes = WarpPicks::kNumLanes;
// Enough threads to have a bus full of requests; they take several nodes each beyond that.
constexpr int64_t kMaxBlocks = 512;
// A thread writes up to this many places of a node by itself.
constexpr int64_t kMaxOfThread = 32;
// Blocks that a multiprocessor is to hold at once: named, as ptxas would spill registers for more.
constexpr int kChooseBlocks = 4, kChooseWeightedBlocks = 2;

__device__ int64_t global_thread() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ int64_t num_threads() { return int64_t{gridDim.x} * blockDim.x; }

__global__ void __launch_bounds__(kBlockThreads)
    count_kernel(const Frontier frontier, int64_t* counts) {
  for (int64_t i = global_thread(); i < frontier.size; i += num_threads())
    counts[i] = count_column<ScanningPicks>(frontier, i);
}

__global__ void __launch_bounds__(kBlockThreads)
    count_weighted_kernel(const Frontier frontier, int64_t* counts) {
  for (int64_t i = global_thread() / kLanes; i < frontier.size; i += num_threads() / kLanes) {
    const int64_t count = count_column<WeighingWarpPicks>(frontier, i);
    if (WarpPicks::lane() == 0) counts[i] = count;
  }
}

// A thread for each node; the lanes of a warp share the work of nodes that take many places.
__global__ void __launch_bounds__(kBlockThreads, kChooseBlocks)
    choose_kernel(const Frontier frontier, const int64_t* ends, int64_t* places) {
  ScanningPicks alone;
  WarpPicks together;
  const int64_t first_thread = global_thread() - WarpPicks::lane();
  for (int64_t first = first_thread; first < frontier.size; first += num_threads()) {
    const int64_t i = first + WarpPicks::lane();
    const int64_t count = i < frontier.size ? count_of(ends, i) : 0;
    if (0 < count && count <= kMaxOfThread)
      choose_column(frontier, i, alone, places + ends[i] - count);
    for (unsigned many = __ballot_sync(0xffffffffu, count > kMaxOfThread); many; many &= many - 1) {
      const int64_t one = first + __ffs(many) - 1;
      choose_column(frontier, one, together, places + ends[one] - count_of(ends, one));
    }
  }
}

__global__ void __launch_bounds__(kBlockThreads, kChooseWeightedBlocks)
    choose_weighted_kernel(const Frontier frontier, const int64_t* ends, int64_t* places) {
  WeighingWarpPicks picks;
  for (int64_t i = global_thread() / kLanes; i < frontier.size; i += num_threads() / kLanes) {
    const int64_t count = count_of(ends, i);
    if (count) choose_column(frontier, i, picks, places + ends[i] - count);
  }
}

template <typename... Arguments>
void launch(void (*by_thread)(Frontier, Arguments...), void (*by_warp)(Frontier, Arguments...),
            const Frontier& frontier, uintptr_t stream, Arguments... arguments) {
  const int64_t per_node = frontier.rules.weight ? kLanes : 1;
  const int64_t blocks = (frontier.size * per_node + kBlockThreads - 1) / kBlockThreads;
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kMaxBlocks)));
  const auto kernel = frontier.rules.weight ? by_warp : by_thread;
  kernel<<<grid, kBlockThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(frontier,
                                                                             arguments...);
}

}  // namespace

void count_frontier_cuda(const Frontier& frontier, int64_t* counts, int device, uintptr_t stream) {
  if (frontier.size == 0) return;
  const CudaDevice use(device);
  launch(count_kernel, count_weighted_kernel, frontier, stream, counts);
  check_cuda(cudaGetLastError(), "launching the sampler's count");
}

void choose_frontier_cuda(const Frontier& frontier, const int64_t* ends, int64_t* places,
                          int device, uintptr_t stream) {
  if (frontier.size == 0) return;
  const CudaDevice use(device);
  launch(choose_kernel, choose_weighted_kernel, frontier, stream, ends, places);
  check_cuda(cudaGetLastError(), "launching the sampler's choice");
}

}  // namespace dataeff
