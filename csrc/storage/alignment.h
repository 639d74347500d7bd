// What direct I/O on an open file demands.
#pragma once

#include <cstdint>

namespace dataeff {

// Memory must start at a multiple of `memory`; file offsets and lengths are multiples of `block`.
// Both are 1 for a file that goes through the page cache.
struct Alignment {
  bool direct = false;
  int64_t memory = 1;
  int64_t block = 1;
};

// Asks the kernel (fcntl, statx DIOALIGN); 4096 where it does not say. Throws OsError for a bad fd.
Alignment alignment_of(int fd);

// Space in [offset, offset + nbytes) is reserved on the disk, so that a full one is found now and
// not in the middle of a transfer. Returns false where the file system cannot reserve: the file is
// then only made longer. Throws OsError (ENOSPC, EFBIG ...).
bool reserve_file(int fd, int64_t offset, int64_t nbytes);

}  // namespace dataeff
