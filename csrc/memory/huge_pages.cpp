#include "memory/huge_pages.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "parallel/parallel_for.h"

#ifndef MADV_COLLAPSE  // Linux 6.1; older kernels answer EINVAL
#define MADV_COLLAPSE 25
#endif

namespace dataeff {
namespace {

using Clock = std::chrono::steady_clock;
using Range = std::pair<uintptr_t, uintptr_t>;

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
// Handed over at once: small enough to notice soon that the kernel has become slow.
constexpr int64_t kPiecePages = 16;
constexpr std::chrono::seconds kPatience{1};
constexpr double kLeastRate = 128 << 20;  // bytes per second; a copy makes some thousand MiB

// The parts of [begin, end) in writable, private, anonymous mappings.
std::vector<Range> anonymous_parts(uintptr_t begin, uintptr_t end) {
  std::vector<Range> parts;
  const std::unique_ptr<FILE, int (*)(FILE*)> maps(std::fopen("/proc/self/maps", "re"),
                                                   std::fclose);
  if (!maps) return parts;
  char line[8192];
  while (std::fgets(line, sizeof line, maps.get())) {
    uint64_t first, last, inode;
    char mode[5];
    if (std::sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %*s %*s %" SCNu64, &first, &last, mode,
                    &inode) != 4)
      continue;
    const bool anonymous = inode == 0 && mode[1] == 'w' && mode[3] == 'p';
    const Range part{std::max<uintptr_t>(first, begin), std::min<uintptr_t>(last, end)};
    if (anonymous && part.first < part.second) parts.push_back(part);
  }
  return parts;
}

}  // namespace

int64_t move_into_huge_pages(void* data, int64_t nbytes, int num_threads) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  prefer_huge_pages(data, nbytes);
  std::atomic<int64_t> moved{0};
  std::atomic<bool> give_up{false};
  const Clock::time_point start = Clock::now();
  for (const auto& [first, last] : anonymous_parts(address, address + nbytes)) {
    const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = last / kHugePage * kHugePage;
    if (begin >= end) continue;
    parallel_for((end - begin) / kHugePage, kPiecePages, num_threads, [&](int64_t i, int64_t j) {
      if (give_up) return;
      void* piece = reinterpret_cast<void*>(begin + i * kHugePage);
      if (madvise(piece, (j - i) * kHugePage, MADV_COLLAPSE) == 0) {
        moved += (j - i) * kHugePage;
      } else if (errno != EAGAIN) {  // EAGAIN: a page was busy; the next piece may do
        give_up = true;
      }
      const std::chrono::duration<double> passed = Clock::now() - start;
      if (passed > kPatience && moved < kLeastRate * passed.count()) give_up = true;
    });
  }
  return moved;
}

}  // namespace dataeff
