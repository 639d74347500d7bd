// What is taken from one column of a CSC graph: how many entries, and which.
#pragma once

#include <cstdint>
#include <limits>

#include "host_device.h"
#include "sampling/random.h"

namespace dataeff {

constexpr int64_t kAnyTime = std::numeric_limits<int64_t>::max();

// What decides the choice within the columns of one relation at one hop.
struct ColumnRules {
  const int32_t* etype;    // [num_edges] or null
  const double* weight;    // [num_edges] or null
  const int64_t* time;     // [num_edges] or null; rises within a column
  const int64_t* fanouts;  // one for the whole column, or one per edge type; -1 takes all
  int64_t num_fanouts;
  bool replace;
  bool last;  // with times: the latest entries instead of a uniform choice
};

// The first place of the ascending [begin, end) whose value is above `value`.
template <typename T>
DATAEFF_HOST_DEVICE int64_t first_above(const T* values, int64_t begin, int64_t end, T value) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (values[middle] <= value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Chooses within columns; `Picker` is `Picks` or `ScanningPicks`.
class ColumnChooser {
 public:
  DATAEFF_HOST_DEVICE explicit ColumnChooser(const ColumnRules& rules) : rules_(rules) {}

  // The number of entries that `choose` will write for the column [begin, end).
  DATAEFF_HOST_DEVICE int64_t count(int64_t begin, int64_t end, int64_t until) const {
    if (rules_.num_fanouts == 1) return count_run(begin, cut(begin, end, until), rules_.fanouts[0]);
    int64_t total = 0;
    while (begin < end) {
      const int32_t type = rules_.etype[begin];
      const int64_t to = first_above(rules_.etype, begin, end, type);
      total += count_run(begin, to, rules_.fanouts[type]);
      begin = to;
    }
    return total;
  }

  // Writes the chosen places; returns how many.
  template <typename Picker, typename Id>
  DATAEFF_HOST_DEVICE int64_t choose(int64_t begin, int64_t end, int64_t until,
                                     const Stream& stream, Picker& picks, Id* places) const {
    if (rules_.num_fanouts == 1) {
      return choose_run(begin, cut(begin, end, until), rules_.fanouts[0], stream, picks, places);
    }
    int64_t total = 0;
    while (begin < end) {
      const int32_t type = rules_.etype[begin];
      const int64_t to = first_above(rules_.etype, begin, end, type);
      total +=
          choose_run(begin, to, rules_.fanouts[type], stream.fork(type), picks, places + total);
      begin = to;
    }
    return total;
  }

 private:
  // The end of the entries that are not later than `until`.
  DATAEFF_HOST_DEVICE int64_t cut(int64_t begin, int64_t end, int64_t until) const {
    return until == kAnyTime ? end : first_above(rules_.time, begin, end, until);
  }

  DATAEFF_HOST_DEVICE int64_t count_run(int64_t begin, int64_t end, int64_t fanout) const {
    int64_t n = end - begin;
    if (rules_.weight) {
      n = 0;
      for (int64_t i = begin; i < end; ++i) n += rules_.weight[i] > 0;
    }
    if (n == 0 || fanout < 0) return n;
    return rules_.replace || fanout < n ? fanout : n;
  }

  template <typename Picker, typename Id>
  DATAEFF_HOST_DEVICE int64_t choose_run(int64_t begin, int64_t end, int64_t fanout,
                                         const Stream& stream, Picker& picks, Id* places) const {
    const int64_t num_chosen = count_run(begin, end, fanout);
    if (num_chosen == 0) return 0;
    const int64_t n = end - begin;
    if (rules_.last) begin = end - (n < num_chosen ? n : num_chosen);
    const bool all = fanout < 0 || (!rules_.replace && n <= fanout) || rules_.last;
    if (rules_.weight) {
      if (rules_.replace && fanout >= 0) {
        picks.weighted(stream, rules_.weight + begin, n, num_chosen, places);
      } else {
        picks.distinct_weighted(stream, rules_.weight + begin, n, num_chosen, places);
      }
    } else if (all) {
      for (int64_t i = 0; i < num_chosen; ++i) places[i] = static_cast<Id>(i);
    } else if (rules_.replace) {
      for (int64_t i = 0; i < num_chosen; ++i) places[i] = static_cast<Id>(stream.below(i, n));
    } else {
      picks.distinct(stream, n, num_chosen, places);
    }
    for (int64_t i = 0; i < num_chosen; ++i) places[i] += static_cast<Id>(begin);
    return num_chosen;
  }

  const ColumnRules rules_;
};

}  // namespace dataeff
