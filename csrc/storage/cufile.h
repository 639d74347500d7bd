// The part of NVIDIA's cuFile that an engine needs, from a library found at run time.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "storage/transfer.h"

namespace dataeff {

// One loaded libcufile with its driver open. Thread-safe.
class Cufile {
 public:
  // Loads `path` and opens the driver. Throws OsError with the reason when the library, one of its
  // functions or the driver is missing, or when it would only bounce through host memory, unasked,
  // because the kernel half (nvidia-fs) is not there.
  explicit Cufile(const std::string& path);
  ~Cufile();
  Cufile(const Cufile&) = delete;
  Cufile& operator=(const Cufile&) = delete;

  // One blocking transfer between `data` (device memory) and the file: a byte count, or a negative
  // errno; EIO for cuFile's own errors. The file is registered when it is first seen.
  int64_t move(Op op, int fd, void* data, int64_t nbytes, int64_t offset);

 private:
  using Handle = void*;
  // CUfileError_t: cuFile's own code, then a CUresult.
  struct Status {
    int error;
    int cuda_error;
  };
  // CUfileDescr_t with a file descriptor (type 1).
  struct Descriptor {
    int type;
    union {
      int fd;
      void* handle;
    };
    const void* operations;
  };
  struct Registered {
    dev_t device;
    ino_t inode;
    Handle handle;
  };

  template <class Function>
  Function* symbol(const char* name);
  void open_driver();
  void require_nvidia_fs();
  Handle handle_of(int fd);
  void bring_context(const void* data);
  void* context_of(uint64_t address);

  const std::string path_;
  std::shared_ptr<void> library_;
  std::shared_ptr<void> driver_;
  Status (*driver_open_)() = nullptr;
  Status (*driver_close_)() = nullptr;
  Status (*get_properties_)(void*) = nullptr;
  Status (*register_)(Handle*, Descriptor*) = nullptr;
  void (*deregister_)(Handle) = nullptr;
  ssize_t (*read_)(Handle, void*, size_t, off_t, off_t) = nullptr;
  ssize_t (*write_)(Handle, const void*, size_t, off_t, off_t) = nullptr;
  // Of the CUDA driver; null where there is none.
  int (*pointer_attribute_)(void*, int, uint64_t) = nullptr;
  int (*set_context_)(void*) = nullptr;
  int (*retain_context_)(void**, int) = nullptr;
  int (*release_context_)(int) = nullptr;

  std::mutex mutex_;
  std::unordered_map<int, Registered> handles_;
  std::unordered_map<int, void*> contexts_;  // retained, by device
};

}  // namespace dataeff
