// Page-aligned host memory of an exact size, private to the process or shareable through a memfd.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>

namespace dataeff {

inline constexpr int64_t kPageBytes = 4096;
inline constexpr int64_t kHugePageBytes = int64_t{2} << 20;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// One mapping, zero-filled by the kernel and committed page by page as it is touched. `capacity` is
// `nbytes` rounded up to whole pages: direct I/O may use the padding of the last page.
class HostMapping {
 public:
  // Throws OsError(ENOMEM ...) when the kernel refuses. Anonymous memory of 2 MiB or more starts on
  // a huge-page boundary and asks for huge pages. What is not `inherited`, forked children do not
  // have at all: of pinned pages each of them would get a copy at the fork.
  static std::shared_ptr<HostMapping> create(int64_t nbytes, bool shared, bool inherited = true);

  // Maps the memory behind another process's memfd. `fd` is duplicated, not taken.
  static std::shared_ptr<HostMapping> attach(int fd, int64_t nbytes);

  ~HostMapping();
  HostMapping(const HostMapping&) = delete;
  HostMapping& operator=(const HostMapping&) = delete;

  char* data() const { return data_; }
  int64_t nbytes() const { return nbytes_; }
  int64_t capacity() const { return capacity_; }
  int fd() const { return fd_; }  // -1 for anonymous memory

 private:
  HostMapping(char* data, int64_t nbytes, int64_t capacity, int fd)
      : data_(data), nbytes_(nbytes), capacity_(capacity), fd_(fd) {}
  static std::shared_ptr<HostMapping> map_fd(int fd, int64_t nbytes);

  char* const data_;
  const int64_t nbytes_;
  const int64_t capacity_;
  const int fd_;
  pid_t owner_pid_ = 0;  // of memory that a child of that process does not have
};

}  // namespace dataeff
