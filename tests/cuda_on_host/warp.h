// The CUDA built-ins that the kernels of csrc/ use, on the host: the kernels themselves run, warp
// by warp, the 32 lanes of a warp as fibres that meet at every shuffle.
//
// A shuffle that not all lanes reach, or at which they meet others that are elsewhere, ends the
// process: on a GPU it would be undefined. dim3 and ulonglong2 are the includer's.
#pragma once

#include <ucontext.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <utility>

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr unsigned kLanes = 32;
constexpr size_t kStackNbytes = 256 << 10;

// The lanes of one warp, of which one runs at a time.
class Warp {
 public:
  explicit Warp(std::function<void()> body) : body_(std::move(body)), stacks_(new char[kSize]) {}

  void run(unsigned first_thread) {
    for (unsigned i = 0; i < kLanes; ++i) {
      getcontext(&lanes_[i]);
      lanes_[i].uc_stack.ss_sp = stacks_.get() + i * kStackNbytes;
      lanes_[i].uc_stack.ss_size = kStackNbytes;
      lanes_[i].uc_link = &scheduler_;
      makecontext(&lanes_[i], begin, 0);
    }
    current = this;
    for (num_done_ = 0; num_done_ == 0;) {
      num_met_ = 0;
      for (lane_ = 0; lane_ < kLanes; ++lane_) {
        threadIdx = dim3(first_thread + lane_);
        swapcontext(&scheduler_, &lanes_[lane_]);
      }
      round_ ^= 1;
      if (num_done_ % kLanes || num_met_ % kLanes) fail("some lanes of a warp missed a shuffle");
    }
  }

  // What `lane() + delta` hands in at the same shuffle; the lane's own value beyond the last.
  int64_t shuffle_down(unsigned mask, int64_t value, unsigned delta) {
    if (mask != 0xffffffffu) fail("a shuffle among some lanes only");
    const unsigned lane = lane_, round = round_;
    handed_in_[round][lane] = value;
    deltas_[lane] = delta;
    ++num_met_;
    swapcontext(&lanes_[lane], &scheduler_);
    if (deltas_[0] != delta && lane == 0) fail("lanes of a warp met at different shuffles");
    return handed_in_[round][lane + delta < kLanes ? lane + delta : lane];
  }

  inline static thread_local Warp* current = nullptr;

 private:
  static constexpr size_t kSize = kLanes * kStackNbytes;

  static void begin() {
    current->body_();
    ++current->num_done_;
  }

  [[noreturn]] static void fail(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::abort();
  }

  std::function<void()> body_;
  std::unique_ptr<char[]> stacks_;
  ucontext_t scheduler_{}, lanes_[kLanes]{};
  int64_t handed_in_[2][kLanes]{};
  unsigned deltas_[kLanes]{};
  unsigned lane_ = 0, round_ = 0, num_met_ = 0, num_done_ = 0;
};

// Whether a device would take such a grid, as far as these kernels go: of one dimension.
inline bool fits(dim3 grid, dim3 block) {
  return grid.x && block.x && block.x <= 1024 && block.x % kLanes == 0 && grid.y * grid.z == 1;
}

// Runs a kernel, block after block.
inline void run_grid(dim3 grid, dim3 block, std::function<void()> body) {
  gridDim = grid, blockDim = block;
  Warp warp(std::move(body));
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b);
    for (unsigned first = 0; first < block.x; first += kLanes) warp.run(first);
  }
}

}  // namespace cuda_on_host

inline ulonglong2 __ldcs(const ulonglong2* at) { return *at; }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return std::atomic_ref(*at).fetch_add(value);
}
inline int64_t __shfl_down_sync(unsigned mask, int64_t value, unsigned delta) {
  return cuda_on_host::Warp::current->shuffle_down(mask, value, delta);
}
