// The CUDA built-ins that the kernels of csrc/ use, on the host: the kernels themselves run, warp
// by warp, the 32 lanes of a warp as fibres that meet at every shuffle.
//
// A shuffle that not all lanes reach, or at which they meet others that are elsewhere, ends the
// process: on a GPU it would be undefined. `launch` stands for `kernel<<<...>>>(...)`.
#pragma once

#include <ucontext.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

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

  inline static Warp* current = nullptr;

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

}  // namespace cuda_on_host

// --- the device side
// ------------------------------------------------------------------------------

struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
inline ulonglong2 __ldcs(const ulonglong2* at) { return *at; }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return std::atomic_ref(*at).fetch_add(value);
}
inline int64_t __shfl_down_sync(unsigned mask, int64_t value, unsigned delta) {
  return cuda_on_host::Warp::current->shuffle_down(mask, value, delta);
}

// --- the runtime
// ------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713
};
using cudaStream_t = void*;

namespace cuda_on_host {
inline int device = 0, num_launches = 0, launched_on = -1;
inline cudaError_t last_error = cudaSuccess;
inline int num_devices = 2;

template <typename Body>
void launch(dim3 grid, dim3 block, size_t, cudaStream_t, Body body) {
  ++num_launches;
  launched_on = device;
  if (!grid.x || !block.x || block.x > 1024 || block.x % kLanes || grid.y * grid.z != 1) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  gridDim = grid, blockDim = block;
  Warp warp(body);
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b);
    for (unsigned first = 0; first < block.x; first += kLanes) warp.run(first);
  }
}
}  // namespace cuda_on_host

inline cudaError_t cudaGetDevice(int* device) {
  return *device = cuda_on_host::device, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_on_host::num_devices) return cudaErrorInvalidDevice;
  return cuda_on_host::device = device, cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_host::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheHost"; }

// --- registration of host memory: written down; fails on command, and leaves its error behind

enum cudaDeviceAttr {
  cudaDevAttrCanUseHostPointerForRegisteredMem,
  cudaDevAttrHostRegisterReadOnlySupported
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost };
struct cudaPointerAttributes {
  cudaMemoryType type;
  void* devicePointer;
};
constexpr unsigned cudaHostRegisterPortable = 1, cudaHostRegisterMapped = 2,
                   cudaHostRegisterReadOnly = 8;

namespace cuda_on_host {
struct Registered {
  uintptr_t end;
  unsigned flags;
};
inline std::map<uintptr_t, Registered> registered;
inline int attributes[2] = {1, 1};
inline int calls_to_failure = -1;
inline cudaError_t failure = cudaErrorMemoryAllocation;

inline cudaError_t failed(cudaError_t error) { return last_error = error; }
inline auto registered_at(uintptr_t address) {
  auto it = registered.upper_bound(address);
  if (it == registered.begin() || std::prev(it)->second.end <= address) return registered.end();
  return std::prev(it);
}
}  // namespace cuda_on_host

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = cuda_on_host::num_devices;
  return *count ? cudaSuccess : cuda_on_host::failed(cudaErrorNoDevice);
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = cuda_on_host::attributes[which], cudaSuccess;
}
inline cudaError_t cudaHostRegister(void* data, size_t nbytes, unsigned flags) {
  using namespace cuda_on_host;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (calls_to_failure >= 0 && calls_to_failure-- == 0) return failed(failure);
  if (!nbytes || nbytes >= size_t{512} << 30) return failed(cudaErrorInvalidValue);
  const auto next = registered.lower_bound(begin);
  if (registered_at(begin) != registered.end() ||
      (next != registered.end() && next->first < begin + nbytes))
    return failed(cudaErrorHostMemoryAlreadyRegistered);
  registered[begin] = {begin + nbytes, flags};
  return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void* data) {
  if (cuda_on_host::registered.erase(reinterpret_cast<uintptr_t>(data))) return cudaSuccess;
  return cuda_on_host::failed(cudaErrorHostMemoryNotRegistered);
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* data) {
  using namespace cuda_on_host;
  const bool known = registered_at(reinterpret_cast<uintptr_t>(data)) != registered.end();
  *found = {known ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered,
            known ? const_cast<void*>(data) : nullptr};
  return cudaSuccess;
}
