#include "sampling/frontier.h"

namespace dataeff {

void count_frontier(const Frontier& frontier, int64_t* counts) {
  for (int64_t i = 0; i < frontier.size; ++i) counts[i] = count_column<Picks>(frontier, i);
}

void choose_frontier(const Frontier& frontier, const int64_t* ends, int64_t* places) {
  Picks picks;
  for (int64_t i = 0; i < frontier.size; ++i)
    choose_column(frontier, i, picks, places + ends[i] - count_of(ends, i));
}

}  // namespace dataeff
