// A CUDA runtime for csrc/ on the host, whose kernels run at their launch (warp.h).
//
// `launch` stands for `kernel<<<...>>>(...)`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

#include "warp.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorHostMemoryAlreadyRegistered = 712,
  cudaErrorHostMemoryNotRegistered = 713,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901
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
  if (!fits(grid, block)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  run_grid(grid, block, body);
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
