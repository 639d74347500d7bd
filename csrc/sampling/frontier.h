// One relation at one hop for samplers whose node lists live on a device.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "sampling/column.h"
#include "sampling/pick.h"

namespace dataeff {

// The nodes that a hop starts from, and the columns it reads. All pointers are readable where the
// work is done: on the device, or registered host memory.
struct Frontier {
  const void* colptr;    // [num_nodes + 1], ids of `id_nbytes`
  int id_nbytes;         // 4 or 8
  const int64_t* node;   // [size]
  const int64_t* tree;   // [size], the tree that each node is in, or null
  const int64_t* until;  // [size], the latest time of its edges, or null
  int64_t size;
  ColumnRules rules;
  uint64_t random_seed;
  int hop;
  int relation;
};

struct Column {
  int64_t begin, end;
};

DATAEFF_HOST_DEVICE Column column_of(const Frontier& frontier, int64_t i) {
  const int64_t node = frontier.node[i];
  if (frontier.id_nbytes == 4) {
    const auto* colptr = static_cast<const int32_t*>(frontier.colptr);
    return {colptr[node], colptr[node + 1]};
  }
  const auto* colptr = static_cast<const int64_t*>(frontier.colptr);
  return {colptr[node], colptr[node + 1]};
}

template <typename Picker>
DATAEFF_HOST_DEVICE int64_t count_column(const Frontier& frontier, int64_t i) {
  const Column column = column_of(frontier, i);
  const int64_t until = frontier.until ? frontier.until[i] : kAnyTime;
  return ColumnChooser(frontier.rules).count<Picker>(column.begin, column.end, until);
}

// The same places as the sampler of the host takes for this seed, hop, relation and node.
template <typename Picker>
DATAEFF_HOST_DEVICE void choose_column(const Frontier& frontier, int64_t i, Picker& picks,
                                       int64_t* places) {
  const Column column = column_of(frontier, i);
  const int64_t until = frontier.until ? frontier.until[i] : kAnyTime;
  Stream stream = Stream(mix64(frontier.random_seed))
                      .fork(frontier.hop)
                      .fork(frontier.relation)
                      .fork(frontier.node[i]);
  if (frontier.tree) stream = stream.fork(frontier.tree[i]);
  ColumnChooser(frontier.rules).choose(column.begin, column.end, until, stream, picks, places);
}

// The number of entries of node i, from the running sum of all.
DATAEFF_HOST_DEVICE int64_t count_of(const int64_t* ends, int64_t i) {
  return ends[i] - (i ? ends[i - 1] : 0);
}

// counts[i]: how many entries node i takes. ends[i]: the sum of counts[0 ... i]. Which they are,
// as places in the CSC graph, goes to the counts[i] places before places[ends[i]].
void count_frontier(const Frontier& frontier, int64_t* counts);
void choose_frontier(const Frontier& frontier, const int64_t* ends, int64_t* places);

// The same on `stream` of `device`. Throw std::runtime_error when CUDA fails or was not built in.
void count_frontier_cuda(const Frontier& frontier, int64_t* counts, int device, uintptr_t stream);
void choose_frontier_cuda(const Frontier& frontier, const int64_t* ends, int64_t* places,
                          int device, uintptr_t stream);

}  // namespace dataeff
