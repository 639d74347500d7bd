#include <cuda_runtime.h>
#include <sys/resource.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "memory/cuda_device.cuh"
#include "memory/page_registry.h"
#include "memory/register.h"
#include "memory/wsl.h"

namespace dataeff {
namespace {

// Below the 512 GiB at which cudaHostRegister fails, and beyond any pool that is copied from and
// to: that a copy may cross from one registration into the next CUDA does not say.
constexpr int64_t kChunkNbytes = int64_t{256} << 30;

bool mapped_read_only(uintptr_t address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    uintptr_t begin = 0, end = 0;
    char dash = 0;
    std::string rights;
    fields >> std::hex >> begin >> dash >> end >> rights;
    if (begin <= address && address < end) return rights.size() > 1 && rights[1] != 'w';
  }
  return false;
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current CUDA device");
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "asking what the CUDA device can do");
  return value;
}

std::string remedy(cudaError_t error, int64_t nbytes, bool read_only) {
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice)
    return "this machine has no usable NVIDIA driver or GPU; index with CPU tensors";
  if (error == cudaErrorHostMemoryAlreadyRegistered)
    return "a part of it has been registered by other code: release that, or give the table a copy "
           "(x.clone())";
  if (error == cudaErrorStreamCaptureUnsupported || error == cudaErrorStreamCaptureInvalidated)
    return "another thread is capturing a CUDA graph: register before, or capture with "
           "capture_error_mode='thread_local'";
  if (under_wsl())
    return "WSL cannot register memory that exists already: give the table pinned memory "
           "(x.pin_memory())";
  if (read_only)
    return "it is mapped read-only, which this device cannot register: give the table a copy "
           "(x.clone()), or map the file copy-on-write (numpy: mmap_mode='c')";
  rlimit limit{};
  getrlimit(RLIMIT_MEMLOCK, &limit);
  if (limit.rlim_cur != RLIM_INFINITY && static_cast<int64_t>(limit.rlim_cur) < nbytes)
    return "the process may lock " + std::to_string(limit.rlim_cur) +
           " bytes: raise the limit (ulimit -l unlimited; docker run --ulimit memlock=-1)";
  return "the pages must be locked in memory: look for other users of memory and for a limit of "
         "the container";
}

class CudaPinner : public PagePinner {
 public:
  void pin(uintptr_t begin, int64_t nbytes) override {
    const bool read_only = mapped_read_only(begin);
    unsigned flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
    if (read_only && attribute(cudaDevAttrHostRegisterReadOnlySupported))
      flags |= cudaHostRegisterReadOnly;
    const cudaError_t error = cudaHostRegister(reinterpret_cast<void*>(begin), nbytes, flags);
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next caller of the runtime would be told of it
    throw std::runtime_error(
        "registering " + std::to_string(nbytes) +
        " bytes of host memory with CUDA failed: " + cudaGetErrorString(error) + " (" +
        cudaGetErrorName(error) + "): " + remedy(error, nbytes, read_only));
  }

  void unpin(uintptr_t begin) noexcept override {
    // Fails only when the context is gone, and the registration with it.
    if (cudaHostUnregister(reinterpret_cast<void*>(begin)) != cudaSuccess) cudaGetLastError();
  }
};

PageRegistry& registry() {
  // Never destroyed: tables may be closed while the process ends.
  static auto* const pages = new PageRegistry(*new CudaPinner, sysconf(_SC_PAGESIZE), kChunkNbytes);
  return *pages;
}

bool pinned_at(uintptr_t address) {
  cudaPointerAttributes attributes{};
  const cudaError_t error =
      cudaPointerGetAttributes(&attributes, reinterpret_cast<const void*>(address));
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && attributes.type != cudaMemoryTypeUnregistered &&
         reinterpret_cast<uintptr_t>(attributes.devicePointer) == address;
}

// Torch's pin_memory pins a block as a whole: it is pinned if both its ends are. Of an end that we
// have pinned ourselves nothing follows: two tables may own the ends of a third, and nobody what is
// between them.
bool pinned_by_its_allocator(uintptr_t data, int64_t nbytes) {
  for (const uintptr_t end : {data, data + nbytes - 1})
    if (registry().covers(end, 1) || !pinned_at(end)) return false;
  return true;
}

void require_device() {
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error == cudaSuccess && num_devices > 0) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("host memory cannot be registered with CUDA: ") +
                           remedy(cudaErrorNoDevice, 0, false) + " (" +
                           cudaGetErrorString(error == cudaSuccess ? cudaErrorNoDevice : error) +
                           ")");
}

}  // namespace

HostRegistration::HostRegistration(uintptr_t data, int64_t nbytes) : owner_pid_(getpid()) {
  require_device();
  if (nbytes <= 0) return;
  if (pinned_by_its_allocator(data, nbytes)) return;  // and its allocator's to release
  if (!attribute(cudaDevAttrCanUseHostPointerForRegisteredMem))
    throw std::runtime_error(
        "this CUDA device cannot read registered memory at its host address: give the table pinned "
        "memory (x.pin_memory())");
  ranges_ = registry().acquire(data, nbytes);
}

void HostRegistration::close() noexcept {
  // A forked child has a copy of this object but not of the driver's state.
  if (!ranges_.empty() && owner_pid_ == getpid()) registry().release(ranges_);
  ranges_.clear();
}

bool is_registered(uintptr_t data, int64_t nbytes) {
  return nbytes <= 0 || registry().covers(data, nbytes) || pinned_by_its_allocator(data, nbytes);
}

}  // namespace dataeff
