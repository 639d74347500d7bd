// Sampled neighbourhoods of seed nodes, over one or more typed CSC graphs in host memory.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace dataeff {

// One CSC graph from nodes of `src_type` to nodes of `dst_type`. Pointers are borrowed: the caller
// keeps them alive as long as the sampler. Ids are as wide as SamplerSpec::id_nbytes says.
struct RelationSpec {
  int src_type;
  int dst_type;
  const void* colptr;    // [num_nodes[dst_type] + 1]
  const void* row;       // [num_edges], source of each edge
  const void* e_id;      // [num_edges], the edge's own id; null when that is its place
  const int32_t* etype;  // [num_edges] or null
  const double* weight;  // [num_edges] or null
  const int64_t* time;   // [num_edges] or null; rises within a column
  // fanouts[hop] holds one number for the whole column, or one per edge type, whose entries must
  // then be sorted by type within a column. -1 takes all.
  std::vector<std::vector<int64_t>> fanouts;
};

struct SamplerSpec {
  int id_nbytes;                   // 4 or 8
  std::vector<int64_t> num_nodes;  // by node type
  std::vector<RelationSpec> relations;
  int num_hops;
  bool replace;
  bool disjoint;  // a tree of its own for each seed; implied by times
  bool last;      // of relations with times: the latest entries instead of a uniform choice
  bool induced;   // return every edge between the sampled nodes, not those taken
};

// Seeds of one node type; `time` bounds the edges of each seed's tree and may be null.
struct Seeds {
  const int64_t* id;
  const int64_t* time;
  int64_t size;
};

// One sampled neighbourhood. Nodes are numbered per type, seeds first, in order of discovery;
// edges are in order of hop and, within a hop, of target.
class Sample {
 public:
  virtual ~Sample() = default;
  virtual const std::vector<int64_t>& nodes_per_hop(int type) const = 0;
  virtual const std::vector<int64_t>& edges_per_hop(int relation) const = 0;
  // Global ids, and the seed whose tree each belongs to (may be null); [sum of nodes_per_hop].
  virtual void write_nodes(int type, int64_t* id, int64_t* tree, int num_threads) const = 0;
  // Local ids of both ends, edge ids and edge types (the last may be null).
  virtual void write_edges(int relation, int64_t* src, int64_t* dst, int64_t* e_id, int64_t* etype,
                           int num_threads) const = 0;
};

class NeighborSampler {
 public:
  virtual ~NeighborSampler() = default;
  static std::shared_ptr<NeighborSampler> make(SamplerSpec spec);
  // `seeds` by node type. Thread-safe. A seed out of range throws std::out_of_range.
  virtual std::unique_ptr<Sample> sample(const std::vector<Seeds>& seeds, uint64_t random_seed,
                                         int num_threads) = 0;
};

}  // namespace dataeff
