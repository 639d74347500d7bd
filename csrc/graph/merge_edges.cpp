#include "graph/merge_edges.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "parallel/parallel_for.h"

namespace dataeff {
namespace {

constexpr int64_t kGrain = 1 << 15;

// Rows of nodes; the first node that is out of range, or -1.
template <class Node, class Index>
int64_t write_rows(const Node* nodes, int64_t stride, int64_t count, const NodeRows& rows,
                   Index* to) {
  bool wrong = false;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t node = nodes[i * stride];
    wrong |= (node < 0) | (node >= rows.limit);
    to[i] = static_cast<Index>(node + (node < rows.num_inner ? rows.first : rows.rest));
  }
  if (!wrong) return -1;
  int64_t at = 0;
  while (nodes[at * stride] >= 0 && nodes[at * stride] < rows.limit) ++at;
  return at;
}

template <class Index>
int64_t write_end(int64_t address, const EdgePart& part, int64_t begin, int64_t count,
                  const NodeRows& rows, Index* to) {
  const auto from = [&](auto zero) {
    const auto* nodes = reinterpret_cast<const decltype(zero)*>(address);
    return write_rows(nodes + begin * part.stride, part.stride, count, rows, to);
  };
  return part.itemsize == 4 ? from(int32_t{}) : from(int64_t{});
}

void keep_least(std::atomic<int64_t>& least, int64_t value) {
  int64_t found = least.load();
  while (value < found && !least.compare_exchange_weak(found, value)) {
  }
}

}  // namespace

template <class Index>
int64_t merge_edges(const EdgePart* parts, int64_t num_parts, Index* src, Index* dst, Index* type,
                    int num_threads) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::vector<int64_t> begin_of(num_parts + 1, 0);
  for (int64_t p = 0; p < num_parts; ++p) begin_of[p + 1] = begin_of[p] + parts[p].num_edges;
  const int64_t num_edges = begin_of.back();
  std::atomic<int64_t> wrong{kNone};
  parallel_for(num_edges, kGrain, num_threads, [&](int64_t begin, int64_t end) {
    int64_t p = std::upper_bound(begin_of.begin(), begin_of.end(), begin) - begin_of.begin() - 1;
    for (; begin < end; ++p) {
      const EdgePart& part = parts[p];
      const int64_t inside = begin - begin_of[p];
      const int64_t count = std::min(end, begin_of[p + 1]) - begin;
      std::fill_n(type + begin, count, static_cast<Index>(part.type));
      const int64_t bad_src = write_end(part.src, part, inside, count, part.src_rows, src + begin);
      const int64_t bad_dst = write_end(part.dst, part, inside, count, part.dst_rows, dst + begin);
      if (bad_src >= 0) keep_least(wrong, begin + bad_src);
      if (bad_dst >= 0) keep_least(wrong, num_edges + begin + bad_dst);
      begin += count;
    }
  });
  return wrong == kNone ? -1 : wrong.load();
}

template int64_t merge_edges<int32_t>(const EdgePart*, int64_t, int32_t*, int32_t*, int32_t*, int);
template int64_t merge_edges<int64_t>(const EdgePart*, int64_t, int64_t*, int64_t*, int64_t*, int);

}  // namespace dataeff
