#include "memory/host_mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <string>

#include "errors.h"

namespace dataeff {
namespace {

int64_t checked_capacity(int64_t nbytes) {
  if (nbytes < 0 || nbytes > (int64_t{1} << 62)) {
    throw std::invalid_argument("nbytes=" + std::to_string(nbytes) + " is no size of a buffer");
  }
  return nbytes == 0 ? kPageBytes : round_up(nbytes, kPageBytes);
}

[[noreturn]] void fail(int code, const std::string& attempt) { throw OsError(code, attempt); }

// Reserves `capacity` bytes that start on a huge-page boundary: maps one huge page too many and
// gives both ends back.
char* map_on_huge_boundary(int64_t capacity) {
  const int64_t reserved = capacity + kHugePageBytes;
  void* base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) {
    fail(errno, "mapping " + std::to_string(capacity) + " bytes of host memory");
  }
  const auto first = reinterpret_cast<uintptr_t>(base);
  const uintptr_t aligned = round_up(static_cast<int64_t>(first), kHugePageBytes);
  if (aligned > first) munmap(base, aligned - first);
  const uintptr_t end = aligned + capacity;
  if (first + reserved > end) munmap(reinterpret_cast<void*>(end), first + reserved - end);
  return reinterpret_cast<char*>(aligned);
}

}  // namespace

std::shared_ptr<HostMapping> HostMapping::create(int64_t nbytes, bool shared, bool inherited) {
  const int64_t capacity = checked_capacity(nbytes);
  if (shared) {
    const int fd = memfd_create("dataeff", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) fail(errno, "creating shared memory");
    if (ftruncate(fd, capacity) != 0) {
      const int code = errno;
      ::close(fd);
      fail(code, "sizing shared memory to " + std::to_string(capacity) + " bytes");
    }
    // No process that holds the descriptor can take pages away from under the others.
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
      const int code = errno;
      ::close(fd);
      fail(code, "sealing the size of shared memory");
    }
    return map_fd(fd, nbytes);
  }
  char* data = nullptr;
  if (capacity >= kHugePageBytes) {
    data = map_on_huge_boundary(capacity);
    // Advice only: kernels without transparent huge pages refuse it, and small pages serve as well.
    madvise(data, capacity, MADV_HUGEPAGE);
  } else {
    void* base =
        mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
      fail(errno, "mapping " + std::to_string(capacity) + " bytes of host memory");
    }
    data = static_cast<char*>(base);
  }
  std::shared_ptr<HostMapping> mapping(new HostMapping(data, nbytes, capacity, -1));
  if (!inherited && madvise(data, capacity, MADV_DONTFORK) == 0) mapping->owner_pid_ = getpid();
  return mapping;
}

std::shared_ptr<HostMapping> HostMapping::attach(int fd, int64_t nbytes) {
  struct stat status{};
  if (fstat(fd, &status) != 0) fail(errno, "looking at fd " + std::to_string(fd));
  // Mapping more than the file holds would turn a wrong size into SIGBUS at the first touch.
  if (checked_capacity(nbytes) > status.st_size) {
    throw std::invalid_argument("nbytes=" + std::to_string(nbytes) + " is more than the " +
                                std::to_string(status.st_size) + " bytes behind fd " +
                                std::to_string(fd));
  }
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) fail(errno, "duplicating fd " + std::to_string(fd));
  return map_fd(own, nbytes);
}

std::shared_ptr<HostMapping> HostMapping::map_fd(int fd, int64_t nbytes) {
  const int64_t capacity = checked_capacity(nbytes);
  void* base = mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) {
    const int code = errno;
    ::close(fd);
    fail(code, "mapping " + std::to_string(capacity) + " bytes of shared memory");
  }
  if (capacity >= kHugePageBytes) madvise(base, capacity, MADV_HUGEPAGE);
  return std::shared_ptr<HostMapping>(
      new HostMapping(static_cast<char*>(base), nbytes, capacity, fd));
}

HostMapping::~HostMapping() {
  // In a forked child other memory may lie there by now.
  if (owner_pid_ != 0 && owner_pid_ != getpid()) return;
  munmap(data_, capacity_);
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace dataeff
