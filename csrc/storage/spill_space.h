// The space of a spill file: extents that are handed out and taken back, growth by reservation.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "memory/extent_map.h"
#include "storage/alignment.h"
#include "storage/fault_plan.h"

namespace dataeff {

// Whether an error says that there is no room: on the disk, within the user's quota, or within the
// process's limit (ulimit -f).
bool is_full(int code);

// Owns the descriptor. Thread-safe.
class SpillSpace {
 public:
  // A new file in `directory`, opened for reading and writing with `flags` and without a name: one
  // that never had any (O_TMPFILE), or one whose name is gone when this returns. Throws OsError.
  static std::shared_ptr<SpillSpace> open(const std::string& directory, int flags, bool named,
                                          std::optional<int64_t> limit,
                                          std::shared_ptr<FaultPlan> faults);

  // `limit`: the most that the file may take. `directory` is for messages.
  SpillSpace(int fd, std::optional<int64_t> limit, std::string directory,
             std::shared_ptr<FaultPlan> faults);
  ~SpillSpace();
  SpillSpace(const SpillSpace&) = delete;
  SpillSpace& operator=(const SpillSpace&) = delete;

  // The offset of an extent of `nbytes`, rounded up to the alignment; the file grows when it must.
  // Throws OsError (see `is_full`) with nothing changed, std::invalid_argument when it is closed.
  int64_t allocate(int64_t nbytes);

  // Takes an extent back. Throws std::invalid_argument when none begins there.
  void free(int64_t offset);

  // Gives the space back to the file system. No transfer may be under way.
  void close();

  int fd() const { return fd_; }  // -1 when it is closed
  int64_t alignment() const { return alignment_; }
  int64_t rounded(int64_t nbytes) const { return extents_.rounded(nbytes); }
  const std::string& directory() const { return directory_; }
  bool reserved() const;
  int64_t used() const;
  int64_t peak() const;
  int64_t capacity() const;

 private:
  void grow(int64_t nbytes);
  void reserve(int64_t offset, int64_t nbytes);

  std::atomic<int> fd_;
  const std::optional<int64_t> limit_;
  const std::string directory_;
  const std::shared_ptr<FaultPlan> faults_;
  const int64_t alignment_;
  mutable std::mutex mutex_;
  ExtentMap extents_;
  bool reserved_ = true;
};

}  // namespace dataeff
