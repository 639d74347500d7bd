#include "storage/cufile.h"

#include <dlfcn.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "errors.h"

namespace dataeff {
namespace {

constexpr int kOpaqueFd = 1;               // CU_FILE_HANDLE_TYPE_OPAQUE_FD
constexpr size_t kPropertiesBytes = 4096;  // CUfileDrvProps_t is some 100 bytes and may grow
constexpr int kContextOfPointer = 1;       // CU_POINTER_ATTRIBUTE_CONTEXT
constexpr int kDeviceOfPointer = 9;        // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL

std::shared_ptr<void> load(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw OsError(ENOENT, std::string("cuFile cannot be loaded: ") + dlerror());
  return {library, dlclose};
}

}  // namespace

template <class Function>
Function* Cufile::symbol(const char* name) {
  void* found = dlsym(library_.get(), name);
  if (!found) throw OsError(ENOSYS, path_ + " has no function " + name);
  return reinterpret_cast<Function*>(found);
}

Cufile::Cufile(const std::string& path) : path_(path), library_(load(path)) {
  driver_open_ = symbol<Status()>("cuFileDriverOpen");
  driver_close_ = symbol<Status()>("cuFileDriverClose");
  get_properties_ = symbol<Status(void*)>("cuFileDriverGetProperties");
  register_ = symbol<Status(Handle*, Descriptor*)>("cuFileHandleRegister");
  deregister_ = symbol<void(Handle)>("cuFileHandleDeregister");
  read_ = symbol<ssize_t(Handle, void*, size_t, off_t, off_t)>("cuFileRead");
  write_ = symbol<ssize_t(Handle, const void*, size_t, off_t, off_t)>("cuFileWrite");
  if (void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
    driver_ = {driver, dlclose};
    pointer_attribute_ =
        reinterpret_cast<int (*)(void*, int, uint64_t)>(dlsym(driver, "cuPointerGetAttribute"));
    set_context_ = reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuCtxSetCurrent"));
    retain_context_ =
        reinterpret_cast<int (*)(void**, int)>(dlsym(driver, "cuDevicePrimaryCtxRetain"));
    release_context_ =
        reinterpret_cast<int (*)(int)>(dlsym(driver, "cuDevicePrimaryCtxRelease_v2"));
  }
  open_driver();
  try {
    require_nvidia_fs();
  } catch (...) {
    driver_close_();
    throw;
  }
}

Cufile::~Cufile() {
  for (auto& [fd, file] : handles_) deregister_(file.handle);
  driver_close_();
  for (auto& [device, context] : contexts_) release_context_(device);
}

void Cufile::open_driver() {
  const Status status = driver_open_();
  if (status.error != 0) {
    throw OsError(ENODEV, "cuFile's driver does not open: cuFile error " +
                              std::to_string(status.error) + ", CUDA error " +
                              std::to_string(status.cuda_error));
  }
}

void Cufile::require_nvidia_fs() {
  // The properties begin with the version of nvidia-fs, 0 where cuFile runs without it.
  std::vector<unsigned> properties(kPropertiesBytes / sizeof(unsigned), 0);
  const Status status = get_properties_(properties.data());
  if (status.error != 0) {
    throw OsError(ENODEV,
                  "cuFile does not tell its properties: error " + std::to_string(status.error));
  }
  if (properties[0] == 0) {
    throw OsError(ENODEV,
                  "cuFile is in its compatibility mode (nvidia-fs is not loaded): it would copy "
                  "through host memory, which the engine threads does with fewer copies");
  }
}

Cufile::Handle Cufile::handle_of(int fd) {
  struct stat now{};
  if (fstat(fd, &now) != 0) throw OsError(errno, "file descriptor " + std::to_string(fd));
  std::lock_guard lock(mutex_);
  const auto known = handles_.find(fd);
  if (known != handles_.end()) {
    if (known->second.device == now.st_dev && known->second.inode == now.st_ino) {
      return known->second.handle;
    }
    deregister_(known->second.handle);  // the number was closed and given to another file
    handles_.erase(known);
  }
  Descriptor descriptor;
  std::memset(&descriptor, 0, sizeof(descriptor));
  descriptor.type = kOpaqueFd;
  descriptor.fd = fd;
  Handle handle = nullptr;
  const Status status = register_(&handle, &descriptor);
  if (status.error != 0) {
    throw OsError(ENOTSUP, "cuFile does not take this file: error " + std::to_string(status.error));
  }
  handles_[fd] = {now.st_dev, now.st_ino, handle};
  return handle;
}

// cuFile works in the calling thread's CUDA context, and the engine's threads have none.
void Cufile::bring_context(const void* data) {
  if (!pointer_attribute_ || !set_context_) return;
  thread_local void* current = nullptr;
  void* context = context_of(reinterpret_cast<uint64_t>(data));
  if (context && context != current && set_context_(context) == 0) current = context;
}

// The context that the memory was allocated in. What was mapped (torch's expandable segments) or
// came from a memory pool was allocated in none: there it is the one of the device, as torch's is.
void* Cufile::context_of(uint64_t address) {
  void* context = nullptr;
  if (pointer_attribute_(&context, kContextOfPointer, address) == 0 && context) return context;
  int device = -1;
  if (pointer_attribute_(&device, kDeviceOfPointer, address) != 0 || device < 0) return nullptr;
  if (!retain_context_ || !release_context_) return nullptr;
  std::lock_guard lock(mutex_);
  const auto known = contexts_.find(device);
  if (known != contexts_.end()) return known->second;
  if (retain_context_(&context, device) != 0) return nullptr;
  return contexts_[device] = context;
}

int64_t Cufile::move(Op op, int fd, void* data, int64_t nbytes, int64_t offset) {
  Handle handle;
  try {
    handle = handle_of(fd);
  } catch (const OsError& error) {
    return -error.code();
  }
  bring_context(data);
  errno = 0;
  const ssize_t result = op == Op::kRead ? read_(handle, data, nbytes, offset, 0)
                                         : write_(handle, data, nbytes, offset, 0);
  if (result >= 0) return result;
  // -1 is a failed system call, with errno; anything below is an error of cuFile's own.
  return result == -1 && errno != 0 ? -errno : -EIO;
}

}  // namespace dataeff
