// Small things that every CUDA file needs: errors as exceptions, and the device of a call.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dataeff {

// Throws std::runtime_error saying what failed and why. The runtime's own record of the error is
// cleared, or the next library that asks for it would be blamed for ours.
inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(what + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ")");
}

// Makes `device` the calling thread's current one and puts the former back.
class CudaDevice {
 public:
  explicit CudaDevice(int device) {
    check_cuda(cudaGetDevice(&former_), "asking for the current CUDA device");
    if (former_ == device) return;
    check_cuda(cudaSetDevice(device), "choosing CUDA device " + std::to_string(device));
    changed_ = true;
  }
  ~CudaDevice() {
    if (changed_) cudaSetDevice(former_);
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

}  // namespace dataeff
