// Edges grouped by target: compressed sparse columns.
#pragma once

#include <cstdint>

namespace dataeff {

// `src` and `dst` of `num_edges` edges; all ids of one call have the same width.
template <typename Id>
struct EdgeList {
  const Id* src;
  const Id* dst;
  int64_t num_edges;
  int64_t num_src_nodes;
  int64_t num_dst_nodes;
};

// Groups edges by `dst` with a stable counting sort: column v holds the places
// colptr[v] ... colptr[v + 1] - 1, with row[place] = src[e] and e_id[place] = e for its edges e in
// the order they are visited, which is `order` (a permutation) or, when that is null, 0, 1, 2 ...
// Writes num_dst_nodes + 1 values to colptr. Returns whether e_id is the identity.
// An id outside its range throws std::out_of_range that names it.
template <typename Id>
bool build_csc(const EdgeList<Id>& edges, const int64_t* order, Id* colptr, Id* row, Id* e_id);

// Throws std::invalid_argument unless colptr rises from 0 to num_edges, and std::out_of_range when
// a row id is not in [0, num_src_nodes).
template <typename Id>
void check_csc(const Id* colptr, int64_t num_dst_nodes, const Id* row, int64_t num_edges,
               int64_t num_src_nodes);

// Whether `value` rises (not strictly) within every column.
template <typename Id, typename Value>
bool sorted_in_columns(const Id* colptr, int64_t num_dst_nodes, const Value* value);

}  // namespace dataeff
