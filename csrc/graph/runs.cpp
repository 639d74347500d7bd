#include "graph/runs.h"

#include <algorithm>
#include <vector>

#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

// Rows that are worth a thread of their own: fewer are done before a second one has woken.
constexpr int64_t kMinChunkRows = 1 << 16;

template <class Index>
struct Runs {
  const Index* a;
  const Index* b;
  int64_t num_rows;
  int num_threads;
  int64_t num_chunks =
      std::max<int64_t>(1, std::min<int64_t>(num_threads, num_rows / kMinChunkRows));

  bool starts(int64_t position) const {
    if (position == 0) return true;
    return (a[position] != a[position - 1]) | (b[position] != b[position - 1]);
  }

  // A chunk begins where a run does, so that no two chunks write to one run.
  int64_t chunk_begin(int64_t c) const {
    int64_t begin = std::min(c * ((num_rows + num_chunks - 1) / num_chunks), num_rows);
    while (begin < num_rows && !starts(begin)) ++begin;
    return begin;
  }

  template <class Each>
  void each_chunk(const Each& each) const {
    parallel_for(num_chunks, 1, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) each(c, chunk_begin(c), chunk_begin(c + 1));
    });
  }

  // Runs that begin before each chunk, and in all.
  std::vector<int64_t> before_chunks() const {
    std::vector<int64_t> before(num_chunks + 1, 0);
    each_chunk([&](int64_t c, int64_t begin, int64_t end) {
      int64_t count = 0;
      for (int64_t i = begin; i < end; ++i) count += starts(i);
      before[c + 1] = count;
    });
    for (int64_t c = 0; c < num_chunks; ++c) before[c + 1] += before[c];
    return before;
  }
};

}  // namespace

template <class Index>
int64_t count_runs(const Index* a, const Index* b, int64_t num_rows, int num_threads) {
  return Runs<Index>{a, b, num_rows, num_threads}.before_chunks().back();
}

template <class Index>
void number_runs(const Index* a, const Index* b, const Index* order, int64_t num_rows,
                 Index* run_of, Index* ptr, Index* run_a, Index* run_b, int num_threads) {
  const Runs<Index> runs{a, b, num_rows, num_threads};
  const std::vector<int64_t> before = runs.before_chunks();
  runs.each_chunk([&](int64_t c, int64_t begin, int64_t end) {
    int64_t run = before[c] - 1;
    for (int64_t i = begin; i < end; ++i) {
      run += runs.starts(i);
      // Written at every row, the last one wins: on random graphs a branch would be mispredicted.
      ptr[run + 1] = static_cast<Index>(i + 1);
      run_a[run] = a[i];
      run_b[run] = b[i];
      run_of[order ? order[i] : i] = static_cast<Index>(run);
    }
  });
  ptr[0] = 0;
}

template int64_t count_runs<int32_t>(const int32_t*, const int32_t*, int64_t, int);
template int64_t count_runs<int64_t>(const int64_t*, const int64_t*, int64_t, int);
template void number_runs<int32_t>(const int32_t*, const int32_t*, const int32_t*, int64_t,
                                   int32_t*, int32_t*, int32_t*, int32_t*, int);
template void number_runs<int64_t>(const int64_t*, const int64_t*, const int64_t*, int64_t,
                                   int64_t*, int64_t*, int64_t*, int64_t*, int);

}  // namespace dataeff
