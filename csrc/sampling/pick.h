// Choosing k of the n entries of one column. Every function is a pure function of its stream.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "host_device.h"
#include "sampling/random.h"

namespace dataeff {

// For one thread of the host, with memory that its choices reuse.
class Picks {
 public:
  // k < n distinct entries, each set of k equally likely: Floyd's algorithm (Bentley and Floyd,
  // CACM 30(9), 1987). `chosen` has room for k and holds them in the order of choice.
  template <typename T>
  void distinct(const Stream& stream, int64_t n, int64_t k, T* chosen) {
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
    std::vector<uint64_t>& bits = taken_;
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
  int64_t distinct_weighted(const Stream& stream, const double* weight, int64_t n, int64_t k,
                            T* chosen) {
    auto& heap = smallest_;
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
  void weighted(const Stream& stream, const double* weight, int64_t n, int64_t k, T* chosen) {
    auto& cumulative = cumulative_;
    cumulative.resize(n);
    double total = 0;
    for (int64_t i = 0; i < n; ++i) cumulative[i] = total += weight[i];
    for (int64_t i = 0; i < k; ++i) {
      const auto above =
          std::upper_bound(cumulative.begin(), cumulative.end(),
                           std::min(stream.unit(i) * total, std::nextafter(total, 0)));
      chosen[i] = static_cast<T>(above - cumulative.begin());
    }
  }

 private:
  std::vector<uint64_t> taken_;                       // a bit per entry, all zero between calls
  std::vector<std::pair<double, int64_t>> smallest_;  // a max-heap of (key, entry)
  std::vector<double> cumulative_;
};

// The same choices without memory of their own, for kernels: longer scans, the same results (of
// weighted ones up to the last bit of the logarithm).
class ScanningPicks {
 public:
  template <typename T>
  DATAEFF_HOST_DEVICE void distinct(const Stream& stream, int64_t n, int64_t k, T* chosen) const {
    for (int64_t i = 0; i < k; ++i) {
      const int64_t last = n - k + i;
      T entry = static_cast<T>(stream.below(i, last + 1));
      for (int64_t j = 0; j < i; ++j) {
        if (chosen[j] == entry) {
          entry = static_cast<T>(last);
          break;
        }
      }
      chosen[i] = entry;
    }
  }

  template <typename T>
  DATAEFF_HOST_DEVICE int64_t distinct_weighted(const Stream& stream, const double* weight,
                                                int64_t n, int64_t k, T* chosen) const {
    int64_t num_chosen = 0, worst = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!(weight[i] > 0)) continue;
      if (num_chosen < k) {
        chosen[num_chosen++] = static_cast<T>(i);
      } else if (key(stream, weight, i) < key(stream, weight, chosen[worst])) {
        chosen[worst] = static_cast<T>(i);
      } else {
        continue;
      }
      if (num_chosen == k) worst = largest(stream, weight, chosen, k);
    }
    for (int64_t i = 1; i < num_chosen; ++i) {
      const T entry = chosen[i];
      int64_t j = i;
      for (; j > 0 && chosen[j - 1] > entry; --j) chosen[j] = chosen[j - 1];
      chosen[j] = entry;
    }
    return num_chosen;
  }

  template <typename T>
  DATAEFF_HOST_DEVICE void weighted(const Stream& stream, const double* weight, int64_t n,
                                    int64_t k, T* chosen) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += weight[i];
    const double limit = nextafter(total, 0.0);
    for (int64_t i = 0; i < k; ++i) {
      const double drawn = stream.unit(i) * total;
      const double level = drawn < limit ? drawn : limit;
      int64_t entry = 0;
      for (double sum = weight[0]; sum <= level;) sum += weight[++entry];
      chosen[i] = static_cast<T>(entry);
    }
  }

 private:
  static DATAEFF_HOST_DEVICE double key(const Stream& stream, const double* weight, int64_t i) {
    return -log(stream.unit(i)) / weight[i];
  }

  // The place of the last to be drawn; of equal keys the later entry.
  template <typename T>
  static DATAEFF_HOST_DEVICE int64_t largest(const Stream& stream, const double* weight,
                                             const T* chosen, int64_t k) {
    int64_t place = 0;
    double top = key(stream, weight, chosen[0]);
    for (int64_t i = 1; i < k; ++i) {
      const double one = key(stream, weight, chosen[i]);
      if (one > top || (one == top && chosen[i] > chosen[place])) {
        place = i;
        top = one;
      }
    }
    return place;
  }
};

}  // namespace dataeff
