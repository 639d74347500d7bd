// Edges by type, whose nodes are numbered within their types, become edges of one graph.
#pragma once

#include <cstdint>

namespace dataeff {

// The nodes of one type at an end of edges: node n < limit is row `first + n` where n < num_inner,
// and else row `rest + n`.
struct NodeRows {
  int64_t limit, num_inner, first, rest;
};

// The edges of one type.
struct EdgePart {
  int64_t src, dst;  // addresses of the first source and destination
  int64_t stride;    // elements from one to the next
  int64_t itemsize;  // 4 or 8, of int32_t or int64_t
  int64_t num_edges;
  int64_t type;  // the number of their relation
  NodeRows src_rows, dst_rows;
};

// Writes the rows that the edges of all parts lead between, one part after the other.
//
//   src, dst, type  [edges of all parts]: receive rows and relations
//
// Returns -1, or the position of the first source that is out of range among all edges, or if there
// is none, the number of all edges plus that of the first such destination.
template <class Index>
int64_t merge_edges(const EdgePart* parts, int64_t num_parts, Index* src, Index* dst, Index* type,
                    int num_threads);

}  // namespace dataeff
