#include "storage/alignment.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>

#include "errors.h"

namespace dataeff {
namespace {

constexpr int64_t kUsualBlock = 4096;

}  // namespace

Alignment alignment_of(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) throw OsError(errno, "fd " + std::to_string(fd) + " is not open");
  if (!(flags & O_DIRECT)) return {};
#ifdef STATX_DIOALIGN
  struct statx status{};
  if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
      (status.stx_mask & STATX_DIOALIGN) && status.stx_dio_offset_align) {
    return {true, std::max<int64_t>(status.stx_dio_mem_align, 1), status.stx_dio_offset_align};
  }
#endif
  return {true, kUsualBlock, kUsualBlock};
}

bool reserve_file(int fd, int64_t offset, int64_t nbytes) {
  int result;
  // Not posix_fallocate: where the file system lacks the call, glibc emulates it by writing single
  // bytes, which direct I/O refuses.
  do {
    result = fallocate(fd, 0, offset, nbytes);
  } while (result != 0 && errno == EINTR);
  if (result == 0) return true;
  if (errno == EOPNOTSUPP || errno == ENOSYS) {
    if (ftruncate(fd, offset + nbytes) == 0) return false;
  }
  throw OsError(errno, "reserving " + std::to_string(nbytes) + " bytes at file offset " +
                           std::to_string(offset));
}

}  // namespace dataeff
