#include <algorithm>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "sampling/csc.h"
#include "sampling/neighbor_sampler.h"

using dataeff::NeighborSampler;
using dataeff::RelationSpec;
using dataeff::Sample;
using dataeff::SamplerSpec;

namespace {

constexpr int64_t kNodes = 3000, kEdges = 40'000;

// A graph in which a few targets have most edges, with types, weights and times.
template <typename Id>
struct Graph {
  std::vector<Id> colptr = std::vector<Id>(kNodes + 1), row = std::vector<Id>(kEdges),
                  e_id = std::vector<Id>(kEdges);
  std::vector<int32_t> etype = std::vector<int32_t>(kEdges);
  std::vector<double> weight = std::vector<double>(kEdges);
  std::vector<int64_t> time = std::vector<int64_t>(kEdges);

  Graph() {
    std::mt19937 random(1);
    std::vector<Id> src(kEdges), dst(kEdges);
    for (int64_t e = 0; e < kEdges; ++e) {
      src[e] = random() % kNodes;
      dst[e] = random() % (random() % 4 ? 10 : kNodes);
    }
    CHECK(!dataeff::build_csc<Id>({src.data(), dst.data(), kEdges, kNodes, kNodes}, nullptr,
                                  colptr.data(), row.data(), e_id.data()));
    for (int64_t i = 0; i < kEdges; ++i) {
      etype[i] = static_cast<int32_t>(random() % 3);
      weight[i] = random() % 5;
      time[i] = random() % 100;
    }
    for (int64_t v = 0; v < kNodes; ++v) {
      std::sort(etype.begin() + colptr[v], etype.begin() + colptr[v + 1]);
      std::sort(time.begin() + colptr[v], time.begin() + colptr[v + 1]);
    }
  }

  RelationSpec relation(std::vector<std::vector<int64_t>> fanouts) const {
    return {0, 0, colptr.data(), row.data(), e_id.data(), nullptr, nullptr, nullptr, fanouts};
  }

  std::shared_ptr<NeighborSampler> sampler(RelationSpec relation, bool replace = false,
                                           bool disjoint = false, bool last = false,
                                           bool induced = false) const {
    const int num_hops = static_cast<int>(relation.fanouts.size());
    return NeighborSampler::make(
        {sizeof(Id), {kNodes}, {std::move(relation)}, num_hops, replace, disjoint, last, induced});
  }
};

int64_t sum(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

// Everything a sample holds, in one row of numbers.
std::vector<int64_t> contents(const Sample& sample, bool disjoint, bool typed) {
  const int64_t nodes = sum(sample.nodes_per_hop(0)), edges = sum(sample.edges_per_hop(0));
  std::vector<int64_t> all(2 * nodes + 4 * edges);
  int64_t* rest = all.data() + 2 * nodes;
  sample.write_nodes(0, all.data(), disjoint ? all.data() + nodes : nullptr, 2);
  sample.write_edges(0, rest, rest + edges, rest + 2 * edges, typed ? rest + 3 * edges : nullptr,
                     2);
  return all;
}

template <typename Id>
void same_for_any_number_of_threads(const Graph<Id>& graph, RelationSpec relation, bool replace,
                                    bool disjoint, bool last = false) {
  std::vector<int64_t> seeds(700), times(700, 60);
  std::iota(seeds.begin(), seeds.end(), 5);
  const bool typed = relation.etype != nullptr;
  const auto sampler = graph.sampler(std::move(relation), replace, disjoint, last);
  const auto draw = [&](int num_threads) {
    return contents(*sampler->sample({{seeds.data(), times.data(), 700}}, 3, num_threads), disjoint,
                    typed);
  };
  const auto expected = draw(1);
  CHECK(expected.size() > 1400);
  CHECK(draw(4) == expected);
  std::vector<std::thread> callers;
  std::vector<std::vector<int64_t>> drawn(4);
  for (auto& own : drawn) callers.emplace_back([&] { own = draw(2); });
  for (std::thread& caller : callers) caller.join();
  for (const auto& own : drawn) CHECK(own == expected);
}

template <typename Id>
void every_mode() {
  const Graph<Id> graph;
  for (bool replace : {false, true}) {
    for (bool disjoint : {false, true}) {
      same_for_any_number_of_threads(graph, graph.relation({{6}, {40}}), replace, disjoint);
      RelationSpec typed = graph.relation({{2, -1, 3}, {2}});
      typed.etype = graph.etype.data();
      same_for_any_number_of_threads(graph, typed, replace, disjoint);
      RelationSpec weighted = graph.relation({{4}, {3}});
      weighted.weight = graph.weight.data();
      same_for_any_number_of_threads(graph, weighted, replace, disjoint);
    }
    RelationSpec timed = graph.relation({{4}, {3}});
    timed.time = graph.time.data();
    same_for_any_number_of_threads(graph, timed, replace, true, !replace);
  }
}

}  // namespace

TEST(samples_are_the_same_for_any_number_of_threads_32) { every_mode<int32_t>(); }
TEST(samples_are_the_same_for_any_number_of_threads_64) { every_mode<int64_t>(); }

TEST(a_sample_outlives_its_sampler_and_its_workspace_is_used_again) {
  const Graph<int32_t> graph;
  auto sampler = graph.sampler(graph.relation({{5}, {5}}));
  std::vector<int64_t> seeds(2000);
  std::iota(seeds.begin(), seeds.end(), 0);
  std::vector<int64_t> expected;
  for (int64_t size : {2000, 1, 0, 1500, 1500}) {
    const auto drawn = sampler->sample({{seeds.data(), nullptr, size}}, 1, 2);
    CHECK_EQ(drawn->nodes_per_hop(0)[0], size);
    if (!expected.empty()) CHECK(contents(*drawn, false, false) == expected);
    if (size == 1500) expected = contents(*drawn, false, false);
  }
  auto last = sampler->sample({{seeds.data(), nullptr, 1500}}, 1, 2);
  sampler.reset();
  CHECK(contents(*last, false, false) == expected);
}

TEST(an_induced_sample_of_all_nodes_is_the_graph) {
  const Graph<int64_t> graph;
  std::vector<int64_t> seeds(kNodes);
  std::iota(seeds.begin(), seeds.end(), 0);
  const auto sampler = graph.sampler(graph.relation({{0}}), false, false, false, true);
  const auto drawn = sampler->sample({{seeds.data(), nullptr, kNodes}}, 1, 2);
  const auto all = contents(*drawn, false, false);
  CHECK_EQ(sum(drawn->edges_per_hop(0)), kEdges);
  CHECK(std::equal(graph.row.begin(), graph.row.end(), all.begin() + 2 * kNodes));
}

TEST(wrong_ids_are_refused) {
  const Graph<int64_t> graph;
  const auto sampler = graph.sampler(graph.relation({{5}}));
  for (int64_t wrong : {int64_t{-1}, kNodes}) {
    CHECK_THROWS(sampler->sample({{&wrong, nullptr, 1}}, 1, 1), std::out_of_range);
    int64_t colptr[2], row[1], e_id[1];
    const int64_t zero = 0;
    CHECK_THROWS(
        dataeff::build_csc<int64_t>({&wrong, &zero, 1, kNodes, 1}, nullptr, colptr, row, e_id),
        std::out_of_range);
    CHECK_THROWS(dataeff::build_csc<int64_t>({&zero, &wrong, 1, 1, 1}, nullptr, colptr, row, e_id),
                 std::out_of_range);
  }
  int64_t falling[3] = {0, 2, 1}, row[1] = {0};
  CHECK_THROWS(dataeff::check_csc<int64_t>(falling, 2, row, 1, 1), std::invalid_argument);
}
