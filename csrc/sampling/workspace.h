// The memory of one sample, kept for the next one.
#pragma once

#include <cstdint>
#include <vector>

#include "sampling/buffer.h"
#include "sampling/local_ids.h"

namespace dataeff {

// The nodes of one type in the order of their discovery: place i holds local id i.
template <typename Id, typename Key>
struct NodeList {
  Buffer<Id> id;
  Buffer<int32_t> tree;  // filled only for disjoint samples
  LocalIds<Key> local;
  std::vector<int64_t> per_hop;

  void reset() {
    id.clear();
    tree.clear();
    local.reset();
    per_hop.clear();
  }
};

// The sampled edges of one relation.
template <typename Id>
struct SampledEdges {
  Buffer<int32_t> src;  // local ids
  Buffer<int32_t> dst;
  Buffer<Id> e_id;
  Buffer<int32_t> etype;  // filled only when the relation has edge types
  std::vector<int64_t> per_hop;

  int64_t size() const { return dst.size(); }

  void reset() {
    resize(0, true);
    per_hop.clear();
  }

  void resize(int64_t size, bool typed) {
    src.resize(size);
    dst.resize(size);
    e_id.resize(size);
    if (typed) etype.resize(size);
  }
};

template <typename Id, typename Key>
struct Workspace {
  std::vector<NodeList<Id, Key>> nodes;  // by node type
  std::vector<SampledEdges<Id>> edges;   // by relation
  Buffer<int64_t> tree_time;             // by tree, when the sample is bounded in time
  Buffer<int64_t> offsets;               // of each frontier node's first edge
  Buffer<Id> found;                      // global source ids of the edges of one step

  void reset() {
    for (auto& list : nodes) list.reset();
    for (auto& list : edges) list.reset();
    tree_time.clear();
  }
};

}  // namespace dataeff
