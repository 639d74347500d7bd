#include "sampling/neighbor_sampler.h"

#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "parallel/parallel_for.h"
#include "sampling/column.h"
#include "sampling/pick.h"
#include "sampling/workspace.h"

namespace dataeff {
namespace {

constexpr int64_t kCountGrain = 2048;  // frontier nodes a thread counts at a time
constexpr int64_t kPickGrain = 128;    // frontier nodes whose picks stay in the L2 cache
constexpr int64_t kWriteGrain = 1 << 16;
constexpr int64_t kPrefetchDistance = 16;

// Id: the graph's ids. Key: what tells two nodes of one batch apart; 64 bits with disjoint trees.
template <typename Id, typename Key>
class TypedSampler final : public NeighborSampler,
                           public std::enable_shared_from_this<TypedSampler<Id, Key>> {
 public:
  using Space = Workspace<Id, Key>;

  explicit TypedSampler(SamplerSpec spec) : spec_(std::move(spec)) {}

  std::unique_ptr<Sample> sample(const std::vector<Seeds>& seeds, uint64_t random_seed,
                                 int num_threads) override;

  std::unique_ptr<Space> check_out() {
    std::lock_guard lock(mutex_);
    if (idle_.empty()) {
      auto space = std::make_unique<Space>();
      space->nodes.resize(spec_.num_nodes.size());
      space->edges.resize(spec_.relations.size());
      return space;
    }
    auto space = std::move(idle_.back());
    idle_.pop_back();
    return space;
  }

  void check_in(std::unique_ptr<Space> space) {
    std::lock_guard lock(mutex_);
    idle_.push_back(std::move(space));
  }

  const SamplerSpec& spec() const { return spec_; }

 private:
  // One relation at one hop: the targets are nodes [begin, end) of its target type.
  struct Step {
    const RelationSpec& relation;
    SampledEdges<Id>& edges;
    NodeList<Id, Key>& targets;
    NodeList<Id, Key>& sources;
    ColumnChooser chooser;
    Stream stream;
    int64_t begin, end;
    int64_t first_edge;
  };

  void add_seeds(Space& space, const std::vector<Seeds>& seeds) const;
  void expand(Space& space, Step step, int num_threads) const;
  void count_edges(Space& space, const Step& step, int num_threads) const;
  void pick_edges(Space& space, const Step& step, int num_threads) const;
  void pick_chunk(Space& space, const Step& step, int64_t from, int64_t to) const;
  void relabel(Space& space, const Step& step) const;
  void induce(Space& space, size_t relation) const;

  Key key(int type, Id id, int32_t tree) const {
    if constexpr (sizeof(Key) == 4) {
      return static_cast<Key>(id);
    } else {
      return static_cast<Key>(tree) * static_cast<Key>(spec_.num_nodes[type]) +
             static_cast<Key>(id);
    }
  }

  ColumnRules rules_at(const RelationSpec& relation, int hop) const {
    const std::vector<int64_t>& fanouts = relation.fanouts[hop];
    return {relation.etype,
            relation.weight,
            relation.time,
            fanouts.data(),
            static_cast<int64_t>(fanouts.size()),
            spec_.replace,
            spec_.last && relation.time};
  }

  int32_t tree_of(const NodeList<Id, Key>& list, int64_t i) const {
    return spec_.disjoint ? list.tree[i] : 0;
  }

  const SamplerSpec spec_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Space>> idle_;
};

// Holds the workspace that it was sampled into, and gives it back.
template <typename Id, typename Key>
class TypedSample final : public Sample {
 public:
  using Sampler = TypedSampler<Id, Key>;

  TypedSample(std::shared_ptr<Sampler> sampler, std::unique_ptr<Workspace<Id, Key>> space)
      : sampler_(std::move(sampler)), space_(std::move(space)) {}
  ~TypedSample() override { sampler_->check_in(std::move(space_)); }

  const std::vector<int64_t>& nodes_per_hop(int type) const override {
    return space_->nodes.at(type).per_hop;
  }
  const std::vector<int64_t>& edges_per_hop(int relation) const override {
    return space_->edges.at(relation).per_hop;
  }

  void write_nodes(int type, int64_t* id, int64_t* tree, int num_threads) const override {
    const auto& nodes = space_->nodes.at(type);
    parallel_for(nodes.id.size(), kWriteGrain, num_threads, [&](int64_t begin, int64_t end) {
      std::copy(nodes.id.data() + begin, nodes.id.data() + end, id + begin);
      if (tree) std::copy(nodes.tree.data() + begin, nodes.tree.data() + end, tree + begin);
    });
  }

  void write_edges(int relation, int64_t* src, int64_t* dst, int64_t* e_id, int64_t* etype,
                   int num_threads) const override {
    const auto& edges = space_->edges.at(relation);
    parallel_for(edges.size(), kWriteGrain, num_threads, [&](int64_t begin, int64_t end) {
      std::copy(edges.src.data() + begin, edges.src.data() + end, src + begin);
      std::copy(edges.dst.data() + begin, edges.dst.data() + end, dst + begin);
      std::copy(edges.e_id.data() + begin, edges.e_id.data() + end, e_id + begin);
      if (etype) std::copy(edges.etype.data() + begin, edges.etype.data() + end, etype + begin);
    });
  }

 private:
  std::shared_ptr<Sampler> sampler_;
  std::unique_ptr<Workspace<Id, Key>> space_;
};

template <typename Id, typename Key>
void TypedSampler<Id, Key>::add_seeds(Space& space, const std::vector<Seeds>& seeds) const {
  int32_t num_trees = 0;
  for (size_t type = 0; type < seeds.size(); ++type) {
    auto& nodes = space.nodes[type];
    for (int64_t i = 0; i < seeds[type].size; ++i) {
      const int64_t id = seeds[type].id[i];
      if (id < 0 || id >= spec_.num_nodes[type]) {
        throw std::out_of_range("seed " + std::to_string(id) + " at position " + std::to_string(i) +
                                " is not in [0, " + std::to_string(spec_.num_nodes[type]) + ")");
      }
      // A seed given twice stands twice in the batch; edges into it use its first place.
      nodes.local.find_or_insert(key(type, id, num_trees), static_cast<int32_t>(i));
      nodes.id.push_back(static_cast<Id>(id));
      if (!spec_.disjoint) continue;
      nodes.tree.push_back(num_trees++);
      space.tree_time.push_back(seeds[type].time ? seeds[type].time[i] : kAnyTime);
    }
  }
}

template <typename Id, typename Key>
std::unique_ptr<Sample> TypedSampler<Id, Key>::sample(const std::vector<Seeds>& seeds,
                                                      uint64_t random_seed, int num_threads) {
  int64_t num_seeds = 0;
  for (const Seeds& one : seeds) num_seeds += one.size;
  if (num_seeds > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("more than 2^31 - 1 seeds: sample them in smaller batches");
  }
  auto space = check_out();
  space->reset();
  add_seeds(*space, seeds);
  std::vector<std::pair<int64_t, int64_t>> frontier;
  for (auto& nodes : space->nodes) {
    nodes.per_hop.push_back(nodes.id.size());
    frontier.emplace_back(0, nodes.id.size());
  }
  const Stream root(mix64(random_seed));
  for (int hop = 0; hop < spec_.num_hops; ++hop) {
    for (size_t r = 0; r < spec_.relations.size(); ++r) {
      const RelationSpec& relation = spec_.relations[r];
      const auto [begin, end] = frontier[relation.dst_type];
      expand(*space,
             {relation, space->edges[r], space->nodes[relation.dst_type],
              space->nodes[relation.src_type], ColumnChooser(rules_at(relation, hop)),
              root.fork(hop).fork(r), begin, end, space->edges[r].size()},
             num_threads);
    }
    for (size_t type = 0; type < frontier.size(); ++type) {
      const int64_t end = space->nodes[type].id.size();
      frontier[type] = {frontier[type].second, end};
      space->nodes[type].per_hop.push_back(end - frontier[type].first);
    }
  }
  if (spec_.induced) {
    for (size_t r = 0; r < spec_.relations.size(); ++r) induce(*space, r);
  }
  return std::make_unique<TypedSample<Id, Key>>(this->shared_from_this(), std::move(space));
}

template <typename Id, typename Key>
void TypedSampler<Id, Key>::expand(Space& space, Step step, int num_threads) const {
  count_edges(space, step, num_threads);
  const int64_t num_edges = space.offsets[step.end - step.begin];
  step.edges.per_hop.push_back(num_edges);
  if (num_edges == 0) return;
  if (step.sources.id.size() + num_edges > std::numeric_limits<int32_t>::max()) {
    throw std::length_error("a sample may hold at most 2^31 - 1 nodes: use smaller batches");
  }
  step.edges.resize(step.first_edge + num_edges, step.relation.etype != nullptr);
  space.found.resize(num_edges);
  pick_edges(space, step, num_threads);
  relabel(space, step);
}

// offsets[i]: the place, within this step, of the first edge of frontier node i.
template <typename Id, typename Key>
void TypedSampler<Id, Key>::count_edges(Space& space, const Step& step, int num_threads) const {
  const Id* colptr = static_cast<const Id*>(step.relation.colptr);
  const Id* frontier = step.targets.id.data() + step.begin;
  const int64_t size = step.end - step.begin;
  space.offsets.resize(size + 1);
  int64_t* offsets = space.offsets.data();
  offsets[0] = 0;
  parallel_for(size, kCountGrain, num_threads, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      if (i + kPrefetchDistance < size) {
        __builtin_prefetch(&colptr[frontier[i + kPrefetchDistance]]);
      }
      const int64_t until =
          step.relation.time ? space.tree_time[step.targets.tree[step.begin + i]] : kAnyTime;
      offsets[i + 1] =
          step.chooser.template count<Picks>(colptr[frontier[i]], colptr[frontier[i] + 1], until);
    }
  });
  for (int64_t i = 0; i < size; ++i) offsets[i + 1] += offsets[i];
}

template <typename Id, typename Key>
void TypedSampler<Id, Key>::pick_edges(Space& space, const Step& step, int num_threads) const {
  parallel_for(step.end - step.begin, kPickGrain, num_threads,
               [&](int64_t from, int64_t to) { pick_chunk(space, step, from, to); });
}

// Picks first and reads after: the cache misses of a whole chunk are under way together.
template <typename Id, typename Key>
void TypedSampler<Id, Key>::pick_chunk(Space& space, const Step& step, int64_t from,
                                       int64_t to) const {
  const RelationSpec& relation = step.relation;
  const Id* colptr = static_cast<const Id*>(relation.colptr);
  const Id* row = static_cast<const Id*>(relation.row);
  const Id* e_id = static_cast<const Id*>(relation.e_id);
  const int64_t* offsets = space.offsets.data();
  Id* places = step.edges.e_id.data() + step.first_edge;
  int32_t* dst = step.edges.dst.data() + step.first_edge;
  Picks picks;
  for (int64_t i = from; i < to; ++i) {
    const int64_t target = step.begin + i;
    if (i + kPrefetchDistance < to) {
      __builtin_prefetch(&colptr[step.targets.id[target + kPrefetchDistance]]);
    }
    const Id node = step.targets.id[target];
    Stream stream = step.stream.fork(node);
    int64_t until = kAnyTime;
    if (spec_.disjoint) {
      const int32_t tree = step.targets.tree[target];
      stream = stream.fork(tree);
      if (relation.time) until = space.tree_time[tree];
    }
    step.chooser.choose(colptr[node], colptr[node + 1], until, stream, picks, places + offsets[i]);
    for (int64_t e = offsets[i]; e < offsets[i + 1]; ++e) {
      dst[e] = static_cast<int32_t>(target);
      __builtin_prefetch(&row[places[e]]);
      if (e_id) __builtin_prefetch(&e_id[places[e]]);
    }
  }
  Id* found = space.found.data();
  int32_t* etype = relation.etype ? step.edges.etype.data() + step.first_edge : nullptr;
  for (int64_t e = offsets[from]; e < offsets[to]; ++e) {
    const Id place = places[e];
    found[e] = row[place];
    if (etype) etype[e] = relation.etype[place];
    if (e_id) places[e] = e_id[place];
  }
}

// Local ids in order of discovery.
template <typename Id, typename Key>
void TypedSampler<Id, Key>::relabel(Space& space, const Step& step) const {
  const int64_t num_edges = space.found.size();
  const Id* found = space.found.data();
  const int32_t* dst = step.edges.dst.data() + step.first_edge;
  int32_t* src = step.edges.src.data() + step.first_edge;
  auto& nodes = step.sources;
  const auto key_of = [&](int64_t e) {
    return key(step.relation.src_type, found[e], tree_of(step.targets, dst[e]));
  };
  for (int64_t e = 0; e < num_edges; ++e) {
    if (e + kPrefetchDistance < num_edges) nodes.local.prefetch(key_of(e + kPrefetchDistance));
    const int32_t next = static_cast<int32_t>(nodes.id.size());
    src[e] = nodes.local.find_or_insert(key_of(e), next);
    if (src[e] != next) continue;
    nodes.id.push_back(found[e]);
    if (spec_.disjoint) nodes.tree.push_back(tree_of(step.targets, dst[e]));
  }
}

// Replaces the edges taken by all those whose both ends were sampled, as one hop.
template <typename Id, typename Key>
void TypedSampler<Id, Key>::induce(Space& space, size_t r) const {
  const RelationSpec& relation = spec_.relations[r];
  const Id* colptr = static_cast<const Id*>(relation.colptr);
  const Id* row = static_cast<const Id*>(relation.row);
  const Id* e_id = static_cast<const Id*>(relation.e_id);
  const auto& targets = space.nodes[relation.dst_type];
  const auto& sources = space.nodes[relation.src_type];
  auto& edges = space.edges[r];
  edges.reset();
  for (int64_t i = 0; i < targets.id.size(); ++i) {
    const Id node = targets.id[i];
    for (Id place = colptr[node]; place < colptr[node + 1]; ++place) {
      const int32_t source =
          sources.local.find(key(relation.src_type, row[place], tree_of(targets, i)));
      if (source < 0) continue;
      edges.src.push_back(source);
      edges.dst.push_back(static_cast<int32_t>(i));
      edges.e_id.push_back(e_id ? e_id[place] : place);
      if (relation.etype) edges.etype.push_back(relation.etype[place]);
    }
  }
  edges.per_hop.push_back(edges.size());
}

}  // namespace

std::shared_ptr<NeighborSampler> NeighborSampler::make(SamplerSpec spec) {
  if (spec.id_nbytes == 8) return std::make_shared<TypedSampler<int64_t, uint64_t>>(spec);
  if (spec.disjoint) return std::make_shared<TypedSampler<int32_t, uint64_t>>(spec);
  return std::make_shared<TypedSampler<int32_t, uint32_t>>(spec);
}

}  // namespace dataeff
