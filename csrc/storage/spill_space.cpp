#include "storage/spill_space.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

#include "errors.h"

namespace dataeff {
namespace {

constexpr int64_t kBlockBytes = 4096;  // every file system takes direct I/O in multiples of this
constexpr int64_t kMinGrowthBytes = int64_t{64} << 20;
constexpr int64_t kMaxGrowthBytes = int64_t{1} << 30;

int64_t unit_of(int fd) {
  const Alignment alignment = alignment_of(fd);
  return std::max({kBlockBytes, alignment.memory, alignment.block});
}

int open_unnamed(const std::string& directory, int flags) {
  return ::open(directory.c_str(), flags | O_RDWR | O_CLOEXEC | O_TMPFILE, 0600);
}

int open_and_unlink(const std::string& directory, int flags) {
  std::string path = directory + "/.dataeff-spill-XXXXXX";
  const int fd = mkostemp(path.data(), flags | O_CLOEXEC);
  if (fd < 0 || unlink(path.c_str()) == 0) return fd;
  const int code = errno;
  ::close(fd);
  errno = code;
  return -1;
}

}  // namespace

bool is_full(int code) { return code == ENOSPC || code == EDQUOT || code == EFBIG; }

std::shared_ptr<SpillSpace> SpillSpace::open(const std::string& directory, int flags, bool named,
                                             std::optional<int64_t> limit,
                                             std::shared_ptr<FaultPlan> faults) {
  int fd;
  do {
    fd = named ? open_and_unlink(directory, flags) : open_unnamed(directory, flags);
  } while (fd < 0 && errno == EINTR);
  if (fd < 0) throw OsError(errno, std::strerror(errno), directory);
  return std::make_shared<SpillSpace>(fd, limit, directory, std::move(faults));
}

SpillSpace::SpillSpace(int fd, std::optional<int64_t> limit, std::string directory,
                       std::shared_ptr<FaultPlan> faults)
    : fd_(fd),
      limit_(limit),
      directory_(std::move(directory)),
      faults_(std::move(faults)),
      alignment_(unit_of(fd)),
      extents_(0, alignment_) {}

SpillSpace::~SpillSpace() {
  // Without the lock: in a forked child a thread that does not exist may hold it.
  if (fd_ >= 0) ::close(fd_);
}

int64_t SpillSpace::allocate(int64_t nbytes) {
  std::lock_guard lock(mutex_);
  if (fd_ < 0) throw std::invalid_argument("the spill file in " + directory_ + " is closed");
  if (const auto offset = extents_.allocate(nbytes)) return *offset;
  grow(extents_.rounded(nbytes));
  return extents_.allocate(nbytes).value();
}

void SpillSpace::free(int64_t offset) {
  std::lock_guard lock(mutex_);
  extents_.free(offset);
}

void SpillSpace::close() {
  std::lock_guard lock(mutex_);
  const int fd = fd_.exchange(-1);
  if (fd >= 0) ::close(fd);
}

// Makes the free tail at least `nbytes` long, and longer where there is room.
void SpillSpace::grow(int64_t nbytes) {
  const int64_t size = extents_.capacity();
  const int64_t needed = nbytes - extents_.tail_free();
  if (limit_ && size + needed > *limit_) {
    throw OsError(ENOSPC,
                  std::to_string(nbytes) + " bytes more than the spill file may take: " +
                      std::to_string(extents_.used()) + " of " + std::to_string(*limit_) +
                      " in use",
                  directory_);
  }
  int64_t growth = std::max(needed, std::clamp(size, kMinGrowthBytes, kMaxGrowthBytes));
  if (limit_) growth = std::max(needed, std::min(growth, *limit_ / alignment_ * alignment_ - size));
  try {
    reserve(size, growth);
  } catch (const OsError& error) {
    if (!is_full(error.code()) || growth == needed) throw;
    reserve(size, growth = needed);
  }
  extents_.grow(size + growth);
}

void SpillSpace::reserve(int64_t offset, int64_t nbytes) {
  const Fault fault = faults_ ? faults_->next(Op::kReserve) : Fault{};
  std::this_thread::sleep_for(fault.delay);
  try {
    if (fault.error) {
      if (fault.max_nbytes) reserve_file(fd_, offset, std::min(nbytes, *fault.max_nbytes));
      throw OsError(fault.error, "reserving " + std::to_string(nbytes) + " bytes");
    }
    reserved_ = reserve_file(fd_, offset, nbytes) && reserved_;
  } catch (const OsError& error) {
    const std::string why = std::string(std::strerror(error.code())) + ", " + error.what();
    // A reservation that failed may keep a part.
    if (ftruncate(fd_, offset) != 0) throw OsError(errno, why + ", and giving back", directory_);
    throw OsError(error.code(), why, directory_);
  }
}

bool SpillSpace::reserved() const {
  std::lock_guard lock(mutex_);
  return reserved_;
}

int64_t SpillSpace::used() const {
  std::lock_guard lock(mutex_);
  return extents_.used();
}

int64_t SpillSpace::peak() const {
  std::lock_guard lock(mutex_);
  return extents_.peak();
}

int64_t SpillSpace::capacity() const {
  std::lock_guard lock(mutex_);
  return extents_.capacity();
}

}  // namespace dataeff
