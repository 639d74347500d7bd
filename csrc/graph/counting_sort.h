// Stable counting sorts of small integer keys: the index structures of relational graphs.
#pragma once

#include <cstdint>

namespace dataeff {

// Rows in ascending order of `key`, equal keys in the order they come.
//
//   key    [num_rows], each in [0, num_keys); the key of a row, not of a position in `first`
//   first  [num_rows] or null: the order in which rows come; null is 0, 1, 2 ...
//   order  [num_rows] or null: receives the rows, sorted
//   rank   [num_rows] or null: receives each row's position in `order`
//   ptr    [num_keys + 1] or null: receives where each key's rows begin, and their number
//
// A stable sort has one result, so it does not depend on the number of threads. Sorting by b, then
// by a with the first order as `first`, sorts by (a, b).
// Throws std::out_of_range naming the first key that is out of range, before anything is written.
template <class Index>
void counting_sort(const Index* key, const Index* first, int64_t num_rows, int64_t num_keys,
                   Index* order, Index* rank, Index* ptr, int num_threads);

}  // namespace dataeff
