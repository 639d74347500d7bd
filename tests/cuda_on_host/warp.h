// The CUDA built-ins that the kernels of csrc/ use, on the host: the kernels themselves run, warp
// by warp, the 32 lanes of a warp as fibres that meet at every shuffle, ballot and __syncwarp.
//
// A meeting that not all lanes reach, or at which they meet others that are elsewhere, ends the
// process: on a GPU it would be undefined. dim3 and ulonglong2 are the includer's.
#pragma once

#include <ucontext.h>

#include <atomic>
#include <bit>
#include <cmath>
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
      if (num_done_ % kLanes || num_met_ % kLanes) fail("some lanes of a warp missed a meeting");
    }
  }

  unsigned lane() const { return lane_; }

  // What each of the lanes hands in at the meeting in that line of the kernel's source; to be read
  // before the meeting after the next.
  const uint64_t* meet(unsigned mask, int line, uint64_t value = 0) {
    if (mask != 0xffffffffu) fail("a meeting of some lanes only");
    const unsigned lane = lane_, round = round_;
    handed_in_[round][lane] = value;
    lines_[round][lane] = line;
    ++num_met_;
    swapcontext(&lanes_[lane], &scheduler_);
    if (lines_[round][0] != line) fail("lanes of a warp met in different places");
    return handed_in_[round];
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
  uint64_t handed_in_[2][kLanes]{};
  int lines_[2][kLanes]{};
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

// Nothing but the warp that runs sees a block's memory: blocks and warps run one after another.
#undef __shared__
#define __shared__ static thread_local
#undef __noinline__
#define __noinline__

inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits ? std::countr_zero(bits) + 1 : 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_on_host::Warp::current->meet(mask, line);
}
inline unsigned __ballot_sync(unsigned mask, bool mine, int line = __builtin_LINE()) {
  const uint64_t* all = cuda_on_host::Warp::current->meet(mask, line, mine);
  unsigned ballot = 0;
  for (unsigned i = 0; i < cuda_on_host::kLanes; ++i) ballot |= unsigned(all[i] != 0) << i;
  return ballot;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned lane, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == sizeof(uint64_t));
  const uint64_t* all =
      cuda_on_host::Warp::current->meet(mask, line, std::bit_cast<uint64_t>(value));
  return std::bit_cast<T>(all[lane % cuda_on_host::kLanes]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, cuda_on_host::Warp::current->lane() ^ lanes, line);
}
// The lane's own value beyond the last.
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned own = cuda_on_host::Warp::current->lane(), from = own + delta;
  return __shfl_sync(mask, value, from < cuda_on_host::kLanes ? from : own, line);
}
