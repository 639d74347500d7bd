#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gather/decode_store.h"
#include "gather/gather.h"
#include "gather/gather_index.h"
#include "gather/stored_rows.h"
#include "memory/cuda_device.cuh"

namespace dataeff {
namespace {

constexpr int kBlockThreads = 512;
// Loads that a thread has under way at once.
constexpr int kUnroll = 4;
// A bus of 55 GB/s with 2 us from request to answer holds 110 KB at any moment; four times that
// leaves room for lanes without work and for warps that are storing. More blocks would only take
// multiprocessors from the work that the gather overlaps with. A machine with a faster link (or a
// slower answer) needs more: GatherOptions::num_blocks overrides it call by call, which Python sets
// from DATAEFF_GATHER_BLOCKS.
constexpr int64_t kBytesInFlight = 448 << 10;
constexpr int64_t kBlockBytesInFlight = int64_t{kBlockThreads} * kUnroll * kWordNbytes;
// Where hot rows are found on the device, the bus carries only the rest of what is in flight: a
// quarter of it, where the access is so skewed that keeping them pays.
constexpr int64_t kHotFactor = 4;

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

// One addition a warp, whatever the number of rows it found.
__device__ void count_hits(const HotTable& hot, int64_t found) {
  for (int lanes = kWarpLanes / 2; lanes > 0; lanes /= 2)
    found += __shfl_down_sync(0xffffffffu, found, lanes);
  if (threadIdx.x % kWarpLanes == 0 && found)
    atomicAdd(reinterpret_cast<unsigned long long*>(hot.hits), found);
}

template <typename Id, typename Store>
__global__ void __launch_bounds__(kBlockThreads)
    gather_kernel(GatherTask<Id> task, Store store, BadIndexReport report) {
  const int lane = threadIdx.x % kWarpLanes;
  const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarpLanes;
  const int64_t num_warps = int64_t{gridDim.x} * blockDim.x / kWarpLanes;
  const int64_t end = num_loads(task.layout, task.num_ids);
  const auto store_word = [](uintptr_t to, const Word& word) {
    *reinterpret_cast<ulonglong2*>(to) = make_ulonglong2(word.low, word.high);
  };
  LaneWalk walk(task.layout, warp, lane, num_warps);
  int64_t found = 0;
  for (int64_t load = warp; load < end; load += num_warps * kUnroll) {
    LanePlace places[kUnroll];
    AskedRow asked[kUnroll];
    int64_t slots[kUnroll];
    WordCopy copies[kUnroll];
    Word words[kUnroll];
    float scales[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      places[i] = walk.next();
      asked[i] = asked_row(task, places[i].position);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) slots[i] = hot_slot(task.hot, asked[i]);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      copies[i] = word_copy(task, places[i], asked[i], slots[i]);
      words[i] = {0, 0};
      if (copies[i].begin < copies[i].end && copies[i].readable)
        words[i] = load_word(copies[i].word);
      scales[i] = store.scale_of(copies[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      store(copies[i], words[i], scales[i], store_word);
      found += copies[i].first_lane && copies[i].hot;
      if (copies[i].first_lane && !copies[i].readable)
        report_bad(report, task.ids[copies[i].position], task.table.num_rows);
    }
  }
  if (task.hot.hits) count_hits(task.hot, found);
}

int grid_blocks(const RowLayout& layout, int64_t num_ids, const GatherOptions& options) {
  const int64_t num_threads = num_loads(layout, num_ids) * kWarpLanes;
  const int64_t useful = (num_threads + kBlockThreads - 1) / kBlockThreads;
  const int64_t in_flight = kBytesInFlight * (options.hot.num_rows > 0 ? kHotFactor : 1);
  const int64_t bound =
      options.num_blocks > 0 ? options.num_blocks : in_flight / kBlockBytesInFlight;
  return static_cast<int>(std::clamp<int64_t>(useful, 1, bound));
}

template <typename Launch>
void with_store(const RowCoding* coding, std::byte* out, const Launch& launch) {
  if (!coding) return launch(StoreBytes{out});
  with_format(coding->format, [&]<typename Rows>(Rows) {
    with_element(coding->element,
                 [&]<typename Out>(Out) { launch(StoreDecoded<Rows, Out>{out, coding->scales}); });
  });
}

template <typename Id>
void launch_gather(const RowTable& table, const RowIndex& index, std::byte* out,
                   const BadIndexReport& report, cudaStream_t stream,
                   const GatherOptions& options) {
  const RowLayout layout = row_layout(table, options.hot);
  const auto* ids = static_cast<const Id*>(index.data);
  const GatherTask<Id> task{table, options.hot, layout, ids, index.size, options.places};
  const int blocks = grid_blocks(layout, index.size, options);
  with_store(options.coding, out, [&](const auto& store) {
    gather_kernel<<<blocks, kBlockThreads, 0, stream>>>(task, store, report);
  });
}

}  // namespace

void gather_cuda(const RowTable& table, const RowIndex& index, std::byte* out,
                 const BadIndexReport& report, int device, uintptr_t stream,
                 const GatherOptions& options) {
  if (index.size == 0 || table.row_nbytes == 0) return;
  const CudaDevice use(device);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  if (index.itemsize == 4) {
    launch_gather<int32_t>(table, index, out, report, on, options);
  } else {
    launch_gather<int64_t>(table, index, out, report, on, options);
  }
  check_cuda(cudaGetLastError(), "launching the gather");
}

}  // namespace dataeff
