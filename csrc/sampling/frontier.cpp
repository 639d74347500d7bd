#include "sampling/frontier.h"

namespace dataeff {

void count_frontier(const Frontier& frontier, int64_t* counts) {
  for (int64_t i = 0; i < frontier.size; ++i) counts[i] = count_column(frontier, i);
}

void choose_frontier(const Frontier& frontier, const int64_t* offsets, int64_t* places) {
  for (int64_t i = 0; i < frontier.size; ++i) {
    choose_column(frontier, i, places + offsets[i]);
  }
}

}  // namespace dataeff
