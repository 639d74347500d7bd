#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gather/gather.h"
#include "gather/gather_index.h"
#include "memory/cuda_device.cuh"

namespace dataeff {
namespace {

constexpr int kBlockThreads = 512;
// Loads that a thread has under way at once.
constexpr int kUnroll = 4;
// A bus of 55 GB/s with 2 us from request to answer holds 110 KB at any moment; four times that
// leaves room for lanes without work and for warps that are storing. More blocks would only take
// multiprocessors from the work that the gather overlaps with.
constexpr int64_t kBytesInFlight = 448 << 10;
constexpr int64_t kBlockBytesInFlight = int64_t{kBlockThreads} * kUnroll * kWordNbytes;

// Every word is read once, so it is not to push other data out of the caches.
__device__ Word load_word(uintptr_t address) {
  const ulonglong2 word = __ldcs(reinterpret_cast<const ulonglong2*>(address));
  return {word.x, word.y};
}

__device__ void report_bad(const BadIndexReport& report, int64_t id, int64_t num_rows) {
  atomicAdd(reinterpret_cast<unsigned long long*>(report.count), 1ULL);
  // Plain stores: atomics to host memory are not atomic on every bus. Any bad index will do.
  volatile int64_t* seen = report.seen;
  seen[1] = id;
  seen[2] = num_rows;
  __threadfence_system();
  seen[0] = 1;
}

template <typename Id>
__global__ void __launch_bounds__(kBlockThreads)
    gather_kernel(RowTable table, RowLayout layout, const Id* ids, int64_t num_ids, std::byte* out,
                  BadIndexReport report) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpLanes;
  const int64_t num_warps = int64_t{gridDim.x} * blockDim.x / kWarpLanes;
  const int64_t end = num_loads(layout, num_ids);
  const auto store_word = [](uintptr_t to, const Word& word) {
    *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(word.low, word.high);
  };
  for (int64_t load = warp; load < end; load += num_warps * kUnroll) {
    WordCopy copies[kUnroll];
    Word words[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      copies[i] = word_copy(table, layout, ids, num_ids, out, load + i * num_warps, lane);
      words[i] = {0, 0};
      if (copies[i].begin < copies[i].end && copies[i].readable)
        words[i] = load_word(copies[i].word);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      store_copy(copies[i], words[i], store_word);
      if (copies[i].first_lane && !copies[i].readable)
        report_bad(report, ids[copies[i].position], table.num_rows);
    }
  }
}

}  // namespace

void gather_cuda(const RowTable& table, const RowIndex& index, std::byte* out,
                 const BadIndexReport& report, int device, uintptr_t stream, int num_blocks) {
  if (index.size == 0 || table.row_nbytes == 0) return;
  const CudaDevice use(device);
  const RowLayout layout = row_layout(table);
  const int64_t num_threads = num_loads(layout, index.size) * kWarpLanes;
  const int64_t useful = (num_threads + kBlockThreads - 1) / kBlockThreads;
  const int64_t bound = num_blocks > 0 ? num_blocks : kBytesInFlight / kBlockBytesInFlight;
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(useful, 1, bound)));
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  if (index.itemsize == 4) {
    gather_kernel<<<grid, kBlockThreads, 0, on>>>(
        table, layout, static_cast<const int32_t*>(index.data), index.size, out, report);
  } else {
    gather_kernel<<<grid, kBlockThreads, 0, on>>>(
        table, layout, static_cast<const int64_t*>(index.data), index.size, out, report);
  }
  check_cuda(cudaGetLastError(), "launching the gather");
}

}  // namespace dataeff
