#include "sampling/csc.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "memory/huge_pages.h"

namespace dataeff {
namespace {

template <typename Id>
void check_range(const char* what, const Id* ids, int64_t size, int64_t num_nodes) {
  for (int64_t i = 0; i < size; ++i) {
    if (ids[i] < 0 || ids[i] >= num_nodes) {
      throw std::out_of_range(std::string(what) + " node " + std::to_string(ids[i]) + " of edge " +
                              std::to_string(i) + " is not in [0, " + std::to_string(num_nodes) +
                              ")");
    }
  }
}

}  // namespace

template <typename Id>
bool build_csc(const EdgeList<Id>& edges, const int64_t* order, Id* colptr, Id* row, Id* e_id) {
  check_range("source", edges.src, edges.num_edges, edges.num_src_nodes);
  check_range("target", edges.dst, edges.num_edges, edges.num_dst_nodes);
  prefer_huge_pages(colptr, (edges.num_dst_nodes + 1) * sizeof(Id));
  prefer_huge_pages(row, edges.num_edges * sizeof(Id));
  prefer_huge_pages(e_id, edges.num_edges * sizeof(Id));
  std::fill_n(colptr, edges.num_dst_nodes + 1, Id{0});
  for (int64_t e = 0; e < edges.num_edges; ++e) ++colptr[edges.dst[e] + 1];
  for (int64_t v = 0; v < edges.num_dst_nodes; ++v) colptr[v + 1] += colptr[v];
  bool identity = true;
  // colptr[v] serves as the place of v's next edge, and so ends where v + 1 began.
  for (int64_t i = 0; i < edges.num_edges; ++i) {
    const int64_t e = order ? order[i] : i;
    const int64_t place = colptr[edges.dst[e]]++;
    row[place] = edges.src[e];
    e_id[place] = static_cast<Id>(e);
    identity &= place == e;
  }
  std::copy_backward(colptr, colptr + edges.num_dst_nodes, colptr + edges.num_dst_nodes + 1);
  colptr[0] = 0;
  return identity;
}

template <typename Id>
void check_csc(const Id* colptr, int64_t num_dst_nodes, const Id* row, int64_t num_edges,
               int64_t num_src_nodes) {
  if (colptr[0] != 0 || colptr[num_dst_nodes] != num_edges) {
    throw std::invalid_argument("colptr must start at 0 and end at the number of edges, " +
                                std::to_string(num_edges) + ", but runs from " +
                                std::to_string(colptr[0]) + " to " +
                                std::to_string(colptr[num_dst_nodes]));
  }
  for (int64_t v = 0; v < num_dst_nodes; ++v) {
    if (colptr[v] > colptr[v + 1]) {
      throw std::invalid_argument("colptr must not fall, but falls from " +
                                  std::to_string(colptr[v]) + " to " +
                                  std::to_string(colptr[v + 1]) + " at node " + std::to_string(v));
    }
  }
  check_range("source", row, num_edges, num_src_nodes);
}

template <typename Id, typename Value>
bool sorted_in_columns(const Id* colptr, int64_t num_dst_nodes, const Value* value) {
  for (int64_t v = 0; v < num_dst_nodes; ++v) {
    if (!std::is_sorted(value + colptr[v], value + colptr[v + 1])) return false;
  }
  return true;
}

template bool build_csc(const EdgeList<int32_t>&, const int64_t*, int32_t*, int32_t*, int32_t*);
template bool build_csc(const EdgeList<int64_t>&, const int64_t*, int64_t*, int64_t*, int64_t*);
template void check_csc(const int32_t*, int64_t, const int32_t*, int64_t, int64_t);
template void check_csc(const int64_t*, int64_t, const int64_t*, int64_t, int64_t);
template bool sorted_in_columns(const int32_t*, int64_t, const int32_t*);
template bool sorted_in_columns(const int32_t*, int64_t, const int64_t*);
template bool sorted_in_columns(const int64_t*, int64_t, const int32_t*);
template bool sorted_in_columns(const int64_t*, int64_t, const int64_t*);

}  // namespace dataeff
