#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "parallel/parallel_for.h"

using dataeff::parallel_for;

namespace {

// Each index is visited once, in pieces of at most `grain`.
void check_cover(int64_t size, int64_t grain, int num_threads) {
  std::vector<int> visits(size);
  std::atomic<int64_t> longest{0};
  parallel_for(size, grain, num_threads, [&](int64_t begin, int64_t end) {
    int64_t seen = longest;
    while (seen < end - begin && !longest.compare_exchange_weak(seen, end - begin)) {
    }
    for (int64_t i = begin; i < end; ++i) ++visits[i];
  });
  for (int64_t i = 0; i < size; ++i) CHECK_EQ(visits[i], 1);
  CHECK(longest <= std::max<int64_t>(grain, 1));
}

}  // namespace

TEST(covers_every_index_once) {
  for (int64_t size : {0, 1, 2, 63, 1000}) {
    for (int64_t grain : {-1, 0, 1, 7, 64, 5000}) {
      for (int num_threads : {0, 1, 2, 8}) check_cover(size, grain, num_threads);
    }
  }
}

TEST(the_first_exception_is_rethrown_and_the_rest_skipped) {
  for (int num_threads : {1, 4}) {
    std::atomic<int> num_run{0};
    try {
      parallel_for(100'000, 1, num_threads, [&](int64_t begin, int64_t) {
        ++num_run;
        if (begin == 10) throw std::out_of_range("index 10");
      });
      CHECK(false && "nothing was thrown");
    } catch (const std::out_of_range& e) {
      CHECK_EQ(std::string(e.what()), "index 10");
    }
    CHECK(num_run < 100'000);
    check_cover(1000, 3, num_threads);  // the pool serves on
  }
}

TEST(a_body_may_call_again) {
  std::atomic<int64_t> sum{0};
  parallel_for(20, 1, 4, [&](int64_t outer, int64_t) {
    parallel_for(50, 4, 3, [&](int64_t begin, int64_t end) { sum += (end - begin) * outer; });
  });
  CHECK_EQ(sum.load(), 50 * 190);
}

TEST(many_callers_at_once) {
  std::vector<std::thread> callers;
  std::atomic<int> num_failed{0};
  for (int caller = 0; caller < 6; ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 50; ++round) {
        std::atomic<int64_t> sum{0};
        parallel_for(300 + caller, 5, 3, [&](int64_t begin, int64_t end) { sum += end - begin; });
        num_failed += sum != 300 + caller;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK_EQ(num_failed.load(), 0);
}

namespace {

int num_teams = 0;

// What libgomp does: `run` on the caller and on num_threads - 1 others.
void fake_team(void (*run)(void*), void* data, unsigned num_threads, unsigned) {
  ++num_teams;
  std::vector<std::thread> team;
  for (unsigned i = 1; i < num_threads; ++i) team.emplace_back(run, data);
  run(data);
  for (std::thread& thread : team) thread.join();
}

}  // namespace

TEST(the_main_thread_uses_the_team_and_others_the_pool) {
  dataeff::use_openmp_team(fake_team);
  check_cover(1000, 3, 4);
  CHECK_EQ(num_teams, 1);
  std::thread([] { check_cover(1000, 3, 4); }).join();
  CHECK_EQ(num_teams, 1);
  try {
    parallel_for(1000, 1, 4, [](int64_t, int64_t) { throw std::out_of_range("index"); });
    CHECK(false && "nothing was thrown");
  } catch (const std::out_of_range&) {
  }
  CHECK_EQ(num_teams, 2);
  dataeff::use_openmp_team(nullptr);
  check_cover(1000, 3, 4);
  CHECK_EQ(num_teams, 2);
}
