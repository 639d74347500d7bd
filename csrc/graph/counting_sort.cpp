#include "graph/counting_sort.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

// Rows that are worth a thread of their own: fewer are done before a second one has woken.
constexpr int64_t kMinChunkRows = 1 << 17;

// Pieces that are counted apart. Each has a counter per key, so that many keys mean few pieces:
// together the counters are no more than the rows.
int64_t count_chunks(int64_t num_rows, int64_t num_keys, int num_threads) {
  const int64_t affordable = num_rows / std::max<int64_t>(num_keys, 1);
  const int64_t wanted = std::min<int64_t>(num_threads, num_rows / kMinChunkRows);
  return std::max<int64_t>(1, std::min(wanted, std::max<int64_t>(affordable, 2)));
}

template <class Index>
struct Sort {
  const Index* key;
  const Index* first;
  int64_t num_rows, num_keys, num_chunks;
  int num_threads;
  std::unique_ptr<Index[]> next;  // [num_chunks, num_keys]: counts, then where to write
  // With `first` the keys in the order that it says: looked up once, not once to count them and
  // once more to place them.
  std::unique_ptr<Index[]> found{};

  Index key_at(int64_t position) const { return found ? found[position] : key[position]; }

  Index row(int64_t position) const {
    return first ? first[position] : static_cast<Index>(position);
  }

  template <class Each>
  void each_chunk(const Each& each) const {
    const int64_t length = (num_rows + num_chunks - 1) / num_chunks;
    parallel_for(num_chunks, 1, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        each(next.get() + c * num_keys, std::min(c * length, num_rows),
             std::min((c + 1) * length, num_rows));
    });
  }

  void count() {
    std::atomic<int64_t> wrong{-1};
    if (first) found = std::make_unique_for_overwrite<Index[]>(num_rows);
    each_chunk([&](Index* counts, int64_t begin, int64_t end) {
      std::fill_n(counts, num_keys, Index(0));
      for (int64_t i = begin; found && i < end; ++i) found[i] = key[first[i]];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = key_at(i);
        if (k < 0 || k >= num_keys) {
          wrong.store(row(i), std::memory_order_relaxed);
          return;
        }
        ++counts[k];
      }
    });
    if (const int64_t at = wrong.load(); at >= 0) {
      throw std::out_of_range("key " + std::to_string(key[at]) + " of row " + std::to_string(at) +
                              " is out of range: there are " + std::to_string(num_keys) + " keys");
    }
  }

  // Counts become positions: all chunks' rows of one key stand together, in the chunks' order.
  void place(Index* ptr) {
    Index position = 0;
    for (int64_t k = 0; k < num_keys; ++k) {
      if (ptr) ptr[k] = position;
      for (int64_t c = 0; c < num_chunks; ++c) {
        Index& slot = next[c * num_keys + k];
        const Index count = slot;
        slot = position;
        position += count;
      }
    }
    if (ptr) ptr[num_keys] = position;
  }

  template <class Write>
  void scatter(const Write& write) {
    each_chunk([&](Index* positions, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        write(row(i), positions[key_at(i)]++);
      }
    });
  }
};

}  // namespace

template <class Index>
void counting_sort(const Index* key, const Index* first, int64_t num_rows, int64_t num_keys,
                   Index* order, Index* rank, Index* ptr, int num_threads) {
  const int64_t chunks = count_chunks(num_rows, num_keys, num_threads);
  Sort<Index> sort{key,
                   first,
                   num_rows,
                   num_keys,
                   chunks,
                   num_threads,
                   std::make_unique_for_overwrite<Index[]>(chunks * num_keys)};
  sort.count();
  sort.place(ptr);
  if (order && rank) {
    sort.scatter([=](Index r, Index p) { order[p] = r, rank[r] = p; });
  } else if (order) {
    sort.scatter([=](Index r, Index p) { order[p] = r; });
  } else if (rank) {
    sort.scatter([=](Index r, Index p) { rank[r] = p; });
  }
}

template void counting_sort<int32_t>(const int32_t*, const int32_t*, int64_t, int64_t, int32_t*,
                                     int32_t*, int32_t*, int);
template void counting_sort<int64_t>(const int64_t*, const int64_t*, int64_t, int64_t, int64_t*,
                                     int64_t*, int64_t*, int);

}  // namespace dataeff
