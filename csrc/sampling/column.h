// What is taken from one column of a CSC graph: how many entries, and which.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "sampling/neighbor_sampler.h"
#include "sampling/pick.h"

namespace dataeff {

constexpr int64_t kAnyTime = std::numeric_limits<int64_t>::max();

// Chooses within columns of `relation` at one hop.
class ColumnChooser {
 public:
  ColumnChooser(const RelationSpec& relation, int hop, bool replace, bool last)
      : relation_(relation), fanouts_(relation.fanouts[hop]), replace_(replace), last_(last) {}

  // The number of entries that `choose` will write for the column [begin, end).
  int64_t count(int64_t begin, int64_t end, int64_t until) const {
    if (fanouts_.size() == 1) return count_run(begin, cut(begin, end, until), fanouts_[0]);
    int64_t total = 0;
    for_each_run(begin, end, [&](int64_t from, int64_t to, int type) {
      total += count_run(from, to, fanouts_[type]);
    });
    return total;
  }

  // Writes the chosen places; returns how many.
  template <typename Id>
  int64_t choose(int64_t begin, int64_t end, int64_t until, const Stream& stream,
                 PickScratch& scratch, Id* places) const {
    if (fanouts_.size() == 1) {
      return choose_run(begin, cut(begin, end, until), fanouts_[0], stream, scratch, places);
    }
    int64_t total = 0;
    for_each_run(begin, end, [&](int64_t from, int64_t to, int type) {
      total += choose_run(from, to, fanouts_[type], stream.fork(type), scratch, places + total);
    });
    return total;
  }

 private:
  // The end of the entries that are not later than `until`.
  int64_t cut(int64_t begin, int64_t end, int64_t until) const {
    if (until == kAnyTime) return end;
    return std::upper_bound(relation_.time + begin, relation_.time + end, until) - relation_.time;
  }

  template <typename Body>
  void for_each_run(int64_t begin, int64_t end, const Body& body) const {
    const int32_t* etype = relation_.etype;
    while (begin < end) {
      const int32_t type = etype[begin];
      const int64_t to = std::upper_bound(etype + begin, etype + end, type) - etype;
      body(begin, to, type);
      begin = to;
    }
  }

  int64_t count_run(int64_t begin, int64_t end, int64_t fanout) const {
    int64_t n = end - begin;
    if (relation_.weight) {
      n = std::count_if(relation_.weight + begin, relation_.weight + end,
                        [](double weight) { return weight > 0; });
    }
    if (n == 0 || fanout < 0) return n;
    return replace_ ? fanout : std::min(n, fanout);
  }

  template <typename Id>
  int64_t choose_run(int64_t begin, int64_t end, int64_t fanout, const Stream& stream,
                     PickScratch& scratch, Id* places) const {
    const int64_t num_chosen = count_run(begin, end, fanout);
    if (num_chosen == 0) return 0;
    const int64_t n = end - begin;
    if (last_) begin = end - std::min(n, num_chosen);
    const bool all = fanout < 0 || (!replace_ && n <= fanout) || last_;
    if (relation_.weight) {
      if (replace_ && fanout >= 0) {
        pick_weighted(stream, relation_.weight + begin, n, num_chosen, scratch, places);
      } else {
        pick_distinct_weighted(stream, relation_.weight + begin, n, num_chosen, scratch, places);
      }
    } else if (all) {
      for (int64_t i = 0; i < num_chosen; ++i) places[i] = static_cast<Id>(i);
    } else if (replace_) {
      for (int64_t i = 0; i < num_chosen; ++i) places[i] = static_cast<Id>(stream.below(i, n));
    } else {
      pick_distinct(stream, n, num_chosen, scratch, places);
    }
    for (int64_t i = 0; i < num_chosen; ++i) places[i] += static_cast<Id>(begin);
    return num_chosen;
  }

  const RelationSpec& relation_;
  const std::vector<int64_t>& fanouts_;
  const bool replace_;
  const bool last_;
};

}  // namespace dataeff
