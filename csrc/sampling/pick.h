// Choosing k of the n entries of one column. Every function is a pure function of its stream.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "sampling/random.h"

namespace dataeff {

// Memory that the choices of one thread reuse.
struct PickScratch {
  std::vector<uint64_t> taken;                       // a bit per entry, all zero between calls
  std::vector<std::pair<double, int64_t>> smallest;  // a max-heap of (key, entry)
  std::vector<double> cumulative;
};

// k < n distinct entries, each set of k equally likely: Floyd's algorithm (Bentley and Floyd,
// CACM 30(9), 1987). `chosen` has room for k and holds them in the order of choice.
template <typename T>
void pick_distinct(const Stream& stream, int64_t n, int64_t k, PickScratch& scratch, T* chosen) {
  constexpr int64_t kScanLimit = 32;  // up to here a scan of what was chosen beats a bitmap
  if (k <= kScanLimit) {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t last = n - k + i;
      const T entry = static_cast<T>(stream.below(i, last + 1));
      const bool taken = std::find(chosen, chosen + i, entry) != chosen + i;
      chosen[i] = taken ? static_cast<T>(last) : entry;
    }
    return;
  }
  std::vector<uint64_t>& bits = scratch.taken;
  if (bits.size() < static_cast<size_t>(n / 64 + 1)) bits.resize(n / 64 + 1);
  for (int64_t i = 0; i < k; ++i) {
    const int64_t last = n - k + i;
    int64_t entry = stream.below(i, last + 1);
    if (bits[entry / 64] >> (entry % 64) & 1) entry = last;
    bits[entry / 64] |= uint64_t{1} << (entry % 64);
    chosen[i] = static_cast<T>(entry);
  }
  for (int64_t i = 0; i < k; ++i) bits[chosen[i] / 64] = 0;
}

// At most k distinct entries of positive weight, drawn one after another in proportion to the
// weights left: the k smallest of -log(u) / weight (Efraimidis and Spirakis, IPL 97, 2006), in
// ascending order of entry. Returns how many.
template <typename T>
int64_t pick_distinct_weighted(const Stream& stream, const double* weight, int64_t n, int64_t k,
                               PickScratch& scratch, T* chosen) {
  auto& heap = scratch.smallest;
  heap.clear();
  for (int64_t i = 0; i < n; ++i) {
    if (!(weight[i] > 0)) continue;
    const std::pair<double, int64_t> item{-std::log(stream.unit(i)) / weight[i], i};
    if (static_cast<int64_t>(heap.size()) < k) {
      heap.push_back(item);
      std::push_heap(heap.begin(), heap.end());
    } else if (item < heap.front()) {
      std::pop_heap(heap.begin(), heap.end());
      heap.back() = item;
      std::push_heap(heap.begin(), heap.end());
    }
  }
  const int64_t num_chosen = static_cast<int64_t>(heap.size());
  for (int64_t i = 0; i < num_chosen; ++i) chosen[i] = static_cast<T>(heap[i].second);
  std::sort(chosen, chosen + num_chosen);
  return num_chosen;
}

// k entries with replacement in proportion to the weights, of which one at least is positive.
template <typename T>
void pick_weighted(const Stream& stream, const double* weight, int64_t n, int64_t k,
                   PickScratch& scratch, T* chosen) {
  auto& cumulative = scratch.cumulative;
  cumulative.resize(n);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) cumulative[i] = total += weight[i];
  for (int64_t i = 0; i < k; ++i) {
    const auto above = std::upper_bound(cumulative.begin(), cumulative.end(),
                                        std::min(stream.unit(i) * total, std::nextafter(total, 0)));
    chosen[i] = static_cast<T>(above - cumulative.begin());
  }
}

}  // namespace dataeff
