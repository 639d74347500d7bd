// Runs of equal (a, b) among rows that are sorted by both: the unique pairs of a graph.
#pragma once

#include <cstdint>

namespace dataeff {

// How many runs there are.
//
//   a, b   [num_rows]: the two columns, in sorted order
template <class Index>
int64_t count_runs(const Index* a, const Index* b, int64_t num_rows, int num_threads);

// Numbers the runs in order.
//
//   order   [num_rows] or null: the row that stands at each position; null is 0, 1, 2 ...
//   run_of  [num_rows]: receives the run of each row
//   ptr     [runs + 1]: receives the position where each run begins, and num_rows
//   run_a, run_b  [runs]: receive the columns of each run
template <class Index>
void number_runs(const Index* a, const Index* b, const Index* order, int64_t num_rows,
                 Index* run_of, Index* ptr, Index* run_a, Index* run_b, int num_threads);

}  // namespace dataeff
