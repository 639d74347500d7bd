// Choosing k of the entries [begin, end) of a column. Every function is a pure function of its
// stream.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "host_device.h"
#include "sampling/random.h"

namespace dataeff {

// What a picker is to `ColumnChooser` when one thread chooses by itself.
struct OneLane {
  static constexpr int kNumLanes = 1;
  static DATAEFF_HOST_DEVICE int lane() { return 0; }
};

// For one thread of the host, with memory that its choices reuse.
class Picks : public OneLane {
 public:
  static constexpr bool kWeighs = true;

  // The number of entries of positive weight, if that is less than `enough`.
  static int64_t count_positive(const double* weight, int64_t begin, int64_t end, int64_t enough) {
    int64_t found = 0;
    for (int64_t i = begin; i < end && found < enough; ++i) found += weight[i] > 0;
    return found;
  }

  // k distinct entries of more than k, each set of k equally likely: Floyd's algorithm (Bentley and
  // Floyd, CACM 30(9), 1987). `chosen` has room for k and holds them in the order of choice.
  template <typename T>
  void distinct(const Stream& stream, int64_t begin, int64_t end, int64_t k, T* chosen) {
    constexpr int64_t kScanLimit = 32;  // up to here a scan of what was chosen beats a bitmap
    const int64_t n = end - begin;
    if (k <= kScanLimit) {
      for (int64_t i = 0; i < k; ++i) {
        const int64_t last = n - k + i;
        const T entry = static_cast<T>(begin + stream.below(i, last + 1));
        const bool taken = std::find(chosen, chosen + i, entry) != chosen + i;
        chosen[i] = taken ? static_cast<T>(begin + last) : entry;
      }
      return;
    }
    std::vector<uint64_t>& bits = taken_;
    if (bits.size() < static_cast<size_t>(n / 64 + 1)) bits.resize(n / 64 + 1);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t last = n - k + i;
      int64_t entry = stream.below(i, last + 1);
      if (bits[entry / 64] >> (entry % 64) & 1) entry = last;
      bits[entry / 64] |= uint64_t{1} << (entry % 64);
      chosen[i] = static_cast<T>(begin + entry);
    }
    for (int64_t i = 0; i < k; ++i) bits[(chosen[i] - begin) / 64] = 0;
  }

  // At most k distinct entries of positive weight, drawn one after another in proportion to the
  // weights left: the k smallest of -log(u) / weight (Efraimidis and Spirakis, IPL 97, 2006), in
  // ascending order of entry. Returns how many.
  template <typename T>
  int64_t distinct_weighted(const Stream& stream, const double* weight, int64_t begin, int64_t end,
                            int64_t k, T* chosen) {
    if (end - begin <= k) return all_positive(weight, begin, end, chosen);
    auto& heap = smallest_;
    heap.clear();
    for (int64_t i = begin; i < end; ++i) {
      if (!(weight[i] > 0)) continue;
      const bool full = static_cast<int64_t>(heap.size()) == k;
      const double u = stream.unit(i - begin);
      // As -log(u) >= 1 - u, few entries of a long column need the logarithm.
      if (full && 1 - u > heap.front().first * weight[i] * kRounding) continue;
      const std::pair<double, int64_t> item{-std::log(u) / weight[i], i};
      if (!full) {
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

  // k entries with replacement in proportion to the weights; none if no weight is positive. Returns
  // how many.
  template <typename T>
  int64_t weighted(const Stream& stream, const double* weight, int64_t begin, int64_t end,
                   int64_t k, T* chosen) {
    if (!count_positive(weight, begin, end, 1)) return 0;
    auto& cumulative = cumulative_;
    cumulative.resize(end - begin);
    double total = 0;
    for (int64_t i = begin; i < end; ++i) cumulative[i - begin] = total += weight[i];
    for (int64_t i = 0; i < k; ++i) {
      const auto above =
          std::upper_bound(cumulative.begin(), cumulative.end(),
                           std::min(stream.unit(i) * total, std::nextafter(total, 0)));
      // Rounding cannot lead beyond the last entry, but a weight that is no number would.
      chosen[i] = static_cast<T>(std::min(begin + (above - cumulative.begin()), end - 1));
    }
    return k;
  }

 private:
  // More than what the logarithm, the division and the product may be off, as a factor.
  static constexpr double kRounding = 1 + 1e-12;

  template <typename T>
  static int64_t all_positive(const double* weight, int64_t begin, int64_t end, T* chosen) {
    int64_t num_chosen = 0;
    for (int64_t i = begin; i < end; ++i)
      if (weight[i] > 0) chosen[num_chosen++] = static_cast<T>(i);
    return num_chosen;
  }

  std::vector<uint64_t> taken_;                       // a bit per entry, all zero between calls
  std::vector<std::pair<double, int64_t>> smallest_;  // a max-heap of (key, entry)
  std::vector<double> cumulative_;
};

// For one thread of a kernel, which has no memory for its choices: few entries of columns without
// weights.
class ScanningPicks : public OneLane {
 public:
  static constexpr bool kWeighs = false;

  template <typename T>
  DATAEFF_HOST_DEVICE void distinct(const Stream& stream, int64_t begin, int64_t end, int64_t k,
                                    T* chosen) const {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t last = end - k + i;
      T entry = static_cast<T>(begin + stream.below(i, last + 1 - begin));
      for (int64_t j = 0; j < i; ++j) {
        if (chosen[j] == entry) {
          entry = static_cast<T>(last);
          break;
        }
      }
      chosen[i] = entry;
    }
  }
};

}  // namespace dataeff
