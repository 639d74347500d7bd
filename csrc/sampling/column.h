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

// Chooses within columns. `Picker` is `Picks`, `ScanningPicks` or `WarpPicks`: its lanes, one or
// 32, call together and share the entries of a run.
class ColumnChooser {
 public:
  DATAEFF_HOST_DEVICE explicit ColumnChooser(const ColumnRules& rules) : rules_(rules) {}

  // The number of entries that `choose` will write for the column [begin, end).
  template <typename Picker>
  DATAEFF_HOST_DEVICE int64_t count(int64_t begin, int64_t end, int64_t until) const {
    int64_t total = 0;
    each_run(begin, end, until, [&](int64_t from, int64_t to, int64_t fanout, int64_t) {
      total += count_run<Picker>(from, to, fanout);
    });
    return total;
  }

  // Writes the chosen places; returns how many.
  template <typename Picker, typename Id>
  DATAEFF_HOST_DEVICE int64_t choose(int64_t begin, int64_t end, int64_t until,
                                     const Stream& stream, Picker& picks, Id* places) const {
    int64_t total = 0;
    each_run(begin, end, until, [&](int64_t from, int64_t to, int64_t fanout, int64_t type) {
      const Stream own = type < 0 ? stream : stream.fork(type);
      total += choose_run(from, to, fanout, own, picks, places + total);
    });
    return total;
  }

 private:
  // Calls body(begin, end, fanout, type) for the runs of entries that have a fan-out of their own;
  // the whole column is of type -1.
  template <typename Body>
  DATAEFF_HOST_DEVICE void each_run(int64_t begin, int64_t end, int64_t until,
                                    const Body& body) const {
    if (rules_.num_fanouts == 1) return body(begin, cut(begin, end, until), rules_.fanouts[0], -1);
    while (begin < end) {
      const int32_t type = rules_.etype[begin];
      const int64_t to = first_above(rules_.etype, begin, end, type);
      body(begin, to, rules_.fanouts[type], type);
      begin = to;
    }
  }

  // The end of the entries that are not later than `until`.
  DATAEFF_HOST_DEVICE int64_t cut(int64_t begin, int64_t end, int64_t until) const {
    return until == kAnyTime ? end : first_above(rules_.time, begin, end, until);
  }

  template <typename Picker>
  DATAEFF_HOST_DEVICE int64_t count_run(int64_t begin, int64_t end, int64_t fanout) const {
    if (fanout == 0) return 0;
    int64_t n = end - begin;
    if constexpr (Picker::kWeighs) {
      // No more weights are read than decide.
      const int64_t enough = fanout < 0 ? n : rules_.replace ? 1 : fanout;
      if (rules_.weight) n = Picker::count_positive(rules_.weight, begin, end, enough);
    }
    if (n == 0 || fanout < 0) return n;
    return rules_.replace || fanout < n ? fanout : n;
  }

  template <typename Picker, typename Id>
  DATAEFF_HOST_DEVICE int64_t choose_run(int64_t begin, int64_t end, int64_t fanout,
                                         const Stream& stream, Picker& picks, Id* places) const {
    const int64_t n = end - begin;
    if (n == 0 || fanout == 0) return 0;
    const bool replace = rules_.replace && fanout > 0;
    if constexpr (Picker::kWeighs) {
      if (rules_.weight) {
        if (replace) return picks.weighted(stream, rules_.weight, begin, end, fanout, places);
        const int64_t most = fanout < 0 ? n : fanout;
        return picks.distinct_weighted(stream, rules_.weight, begin, end, most, places);
      }
    }
    const int64_t num_chosen = count_run<Picker>(begin, end, fanout);
    const int64_t step = Picker::kNumLanes;
    if (replace) {
      for (int64_t i = Picker::lane(); i < num_chosen; i += step)
        places[i] = static_cast<Id>(begin + stream.below(i, n));
    } else if (num_chosen == n || rules_.last) {
      const int64_t first = end - num_chosen;
      for (int64_t i = Picker::lane(); i < num_chosen; i += step)
        places[i] = static_cast<Id>(first + i);
    } else {
      picks.distinct(stream, begin, end, num_chosen, places);
    }
    return num_chosen;
  }

  const ColumnRules rules_;
};

}  // namespace dataeff
