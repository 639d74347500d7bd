// Fewer page faults for large new arrays, and fewer page-table walks when they are read at random.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace dataeff {

// Asks for 2 MiB pages under [data, data + nbytes). Call it before the memory is first written:
// pages that exist already stay as they are. A wish, so what the kernel answers does not matter.
inline void prefer_huge_pages(void* data, int64_t nbytes) {
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kWorthwhile = 4 << 20;  // below, the second-level TLB covers 4 KiB pages too
  if (nbytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + nbytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// Moves the pages that exist under [data, data + nbytes) into 2 MiB pages, in place: addresses and
// contents stay, other threads may read and write meanwhile. Returns how many bytes now lie in such
// pages. Only private anonymous memory is touched (what malloc gives), never a mapped file.
//
// It costs about a copy of the memory, once. It gives up where the kernel has no huge pages to give
// or takes long to find them: after `kPatience` at less than `kLeastRate`.
int64_t move_into_huge_pages(void* data, int64_t nbytes, int num_threads);

}  // namespace dataeff
