#include "memory/same_bytes.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

constexpr int64_t kPieceBytes = 64 << 10;
constexpr int64_t kPiecesAtOnce = 4;  // one thread does what is smaller: it waits for no other

// Calls each(original, copy, nbytes) for pieces of all parts, on several threads.
template <class Each>
void for_pieces(const CopiedBytes* parts, int64_t num_parts, int num_threads, const Each& each) {
  std::vector<CopiedBytes> pieces;
  for (const CopiedBytes* part = parts; part < parts + num_parts; ++part)
    for (int64_t done = 0; done < part->nbytes; done += kPieceBytes)
      pieces.push_back(
          {part->original + done, part->copy + done, std::min(kPieceBytes, part->nbytes - done)});
  parallel_for(static_cast<int64_t>(pieces.size()), kPiecesAtOnce, num_threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t k = begin; k < end; ++k)
                   each(reinterpret_cast<const void*>(pieces[k].original),
                        reinterpret_cast<void*>(pieces[k].copy), pieces[k].nbytes);
               });
}

}  // namespace

void copy_bytes(const CopiedBytes* parts, int64_t num_parts, int num_threads) {
  for_pieces(parts, num_parts, num_threads,
             [](const void* from, void* to, int64_t nbytes) { std::memcpy(to, from, nbytes); });
}

bool same_bytes(const CopiedBytes* parts, int64_t num_parts, int num_threads) {
  std::atomic<bool> same{true};
  for_pieces(parts, num_parts, num_threads, [&](const void* a, const void* b, int64_t nbytes) {
    if (same.load(std::memory_order_relaxed) && std::memcmp(a, b, nbytes) != 0)
      same.store(false, std::memory_order_relaxed);
  });
  return same;
}

}  // namespace dataeff
