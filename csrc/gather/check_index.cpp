#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "gather/gather.h"
#include "gather/wide_vectors.h"
#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

constexpr int64_t kGrain = 1 << 16;

// id is good when id + n >= 0 and n - 1 - id >= 0; both signs are gathered by OR, which the
// compiler turns into vector code. Unsigned arithmetic wraps where id is near the ends of its type,
// and the wrapped value has the sign that marks it as bad.
template <typename Id>
inline __attribute__((always_inline)) bool any_bad_of(const Id* ids, int64_t size,
                                                      int64_t num_rows) {
  const auto n = static_cast<uint64_t>(num_rows);
  uint64_t signs = 0;
  for (int64_t i = 0; i < size; ++i) {
    const auto id = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
    signs |= (id + n) | (n - 1 - id);
  }
  return signs >> 63;
}

#if DATAEFF_HAS_WIDE
template <typename Id>
DATAEFF_WIDE bool any_bad_wide(const Id* ids, int64_t size, int64_t num_rows) {
  return any_bad_of(ids, size, num_rows);
}
#endif

template <typename Id>
bool any_bad(const Id* ids, int64_t size, int64_t num_rows) {
#if DATAEFF_HAS_WIDE
  if (wide_vectors()) return any_bad_wide(ids, size, num_rows);
#endif
  return any_bad_of(ids, size, num_rows);
}

template <typename Id>
[[noreturn]] void throw_first_bad(const Id* ids, int64_t begin, int64_t num_rows) {
  int64_t at = begin;
  while (ids[at] >= -num_rows && ids[at] < num_rows) ++at;
  const std::string valid =
      num_rows ? "valid are " + std::to_string(-num_rows) + " to " + std::to_string(num_rows - 1)
               : "it has no row to gather";
  throw std::out_of_range("index " + std::to_string(ids[at]) + " at position " +
                          std::to_string(at) + " is out of range for a table of " +
                          std::to_string(num_rows) + " rows: " + valid);
}

template <typename Id>
void check(const Id* ids, int64_t size, int64_t num_rows, int num_threads) {
  std::atomic<int64_t> first_bad_piece{size};
  parallel_for(size, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    if (!any_bad(ids + begin, end - begin, num_rows)) return;
    int64_t seen = first_bad_piece.load();
    while (begin < seen && !first_bad_piece.compare_exchange_weak(seen, begin)) {
    }
  });
  if (first_bad_piece < size) throw_first_bad(ids, first_bad_piece, num_rows);
}

}  // namespace

void check_index(const RowIndex& index, int64_t num_rows, int num_threads) {
  if (index.itemsize == 4) {
    check(static_cast<const int32_t*>(index.data), index.size, num_rows, num_threads);
  } else {
    check(static_cast<const int64_t*>(index.data), index.size, num_rows, num_threads);
  }
}

}  // namespace dataeff
