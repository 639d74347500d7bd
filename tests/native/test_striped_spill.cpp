// Many threads that write, read, cancel, wait and let go, over disks that fail, fill and close.
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "errors.h"
#include "storage/engine.h"
#include "storage/spill_space.h"
#include "storage/striped_spill.h"

using namespace dataeff;
using std::chrono::microseconds;
using std::chrono::seconds;

namespace {

constexpr int64_t kChunk = 64 << 10;
constexpr int64_t kMost = 5 * kChunk;

int unnamed_file() {
  char path[] = "./native-XXXXXX";
  const int fd = mkostemp(path, O_CLOEXEC);
  CHECK(fd >= 0);
  unlink(path);
  return fd;
}

std::shared_ptr<StripedSpill> open_spill(int num_lanes, std::optional<int64_t> chunk,
                                         std::shared_ptr<FaultPlan> faults,
                                         std::optional<int64_t> limit = std::nullopt) {
  const auto spill = std::make_shared<StripedSpill>(chunk);
  for (int i = 0; i < num_lanes; ++i) {
    spill->add(
        std::make_shared<SpillSpace>(unnamed_file(), limit, "lane " + std::to_string(i), faults),
        make_threads_engine(2, faults));
  }
  return spill;
}

// Memory that nobody but its holders may touch: what still reads or writes it when the last has let
// go is found by the sanitizers.
std::shared_ptr<char> memory_of(int64_t nbytes) {
  return {new char[nbytes], [](char* data) { delete[] data; }};
}

std::shared_ptr<char> filled(int64_t nbytes, unsigned seed) {
  const auto data = memory_of(nbytes);
  for (int64_t i = 0; i < nbytes; ++i) data.get()[i] = static_cast<char>(seed + i * 7 + i / 251);
  return data;
}

bool holds(const char* data, int64_t nbytes, unsigned seed) {
  for (int64_t i = 0; i < nbytes; ++i) {
    if (data[i] != static_cast<char>(seed + i * 7 + i / 251)) return false;
  }
  return true;
}

// Reads the stripe back. False where it came back wrong; a disk that fails is not wrong.
bool reads_back(Stripe& stripe, unsigned seed) {
  const auto target = memory_of(stripe.nbytes);
  const auto read = stripe.read(target.get(), target);
  CHECK(read->wait_for(seconds(120)));
  CHECK(read->done());
  return read->failed() || holds(target.get(), stripe.nbytes, seed);
}

struct Tally {
  std::atomic<int> num_wrong{0}, num_refused{0}, num_cancelled{0}, num_failed{0}, num_read{0};
};

// One write and what becomes of it; its memory is let go as soon as the stripe holds it.
void live_once(StripedSpill& spill, std::mt19937& random, Tally& tally) {
  const unsigned seed = random();
  const int64_t nbytes = 1 + random() % kMost;
  std::shared_ptr<Stripe> stripe;
  try {
    auto source = filled(nbytes, seed);
    char* data = source.get();
    stripe = spill.write(data, nbytes, std::move(source));
  } catch (const OsError& error) {
    CHECK(is_full(error.code()));
    ++tally.num_refused;
    return;
  }
  switch (random() % 5) {
    case 0:  // let go at once
      return;
    case 1:
      if (stripe->cancel()) {
        stripe->drop_source();
        CHECK_EQ(stripe->failure()->code, ECANCELED);
        ++tally.num_cancelled;
        return;
      }
      break;
    case 2:  // wait for it a little, then think better of it
      stripe->wait_for(microseconds(random() % 300));
      stripe->free();
      CHECK_EQ(stripe->place(), "no spill file");
      return;
    default:
      break;
  }
  CHECK(stripe->wait_for(seconds(120)));
  CHECK(stripe->done());
  stripe->drop_source();
  if (stripe->failure()) {
    ++tally.num_failed;
    return;
  }
  if (random() % 4 == 0) {  // a read that is let go midway, and the stripe before it
    const auto target = memory_of(nbytes);
    const auto read = stripe->read(target.get(), target);
    stripe.reset();
    read->wait_for(microseconds(random() % 200));
    return;
  }
  tally.num_wrong += !reads_back(*stripe, seed);
  ++tally.num_read;
}

void live(StripedSpill& spill, int seed, int num_rounds, Tally& tally) {
  std::mt19937 random(seed);
  for (int round = 0; round < num_rounds; ++round) live_once(spill, random, tally);
}

void in_threads(int num_threads, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back([&, i] { body(i); });
  for (std::thread& thread : threads) thread.join();
}

void check_empty(const StripedSpill& spill) {
  CHECK_EQ(spill.used(), 0);
  for (const SpillLane& lane : spill.lanes()) CHECK_EQ(lane.in_flight_nbytes, 0);
}

void check_stress(const std::shared_ptr<StripedSpill>& spill, Tally& tally) {
  in_threads(4, [&](int i) { live(*spill, i, 60, tally); });
  CHECK_EQ(tally.num_wrong.load(), 0);
  CHECK(tally.num_read > 0);
  check_empty(*spill);
  spill->close();
}

}  // namespace

TEST(writers_do_not_disturb_one_another) {
  for (const int num_lanes : {1, 3}) {
    for (const auto chunk : {std::optional<int64_t>(kChunk), std::optional<int64_t>()}) {
      Tally tally;
      check_stress(open_spill(num_lanes, chunk, nullptr), tally);
      CHECK_EQ(tally.num_failed + tally.num_refused, 0);
    }
  }
}

TEST(nor_where_disks_are_slow_short_and_failing) {
  for (const int num_lanes : {1, 3}) {
    const auto faults = std::make_shared<FaultPlan>();
    faults->add(std::nullopt, {.max_nbytes = 30'001}, 1, 3, std::nullopt);
    faults->add(std::nullopt, {.delay = microseconds(300)}, 1, 4, std::nullopt);
    faults->add(Op::kWrite, {.error = EIO}, 5, 9, std::nullopt);
    faults->add(Op::kRead, {.error = EIO}, 5, 31, std::nullopt);
    Tally tally;
    const auto spill = open_spill(num_lanes, kChunk, faults);
    check_stress(spill, tally);
    int64_t num_failures = 0;
    for (const SpillLane& lane : spill->lanes()) num_failures += lane.num_failures;
    CHECK(num_failures > 0);
    CHECK_EQ(spill->take_warnings().size(), static_cast<size_t>(num_lanes - 1));  // but the last
  }
}

TEST(nor_where_disks_are_full) {
  const auto faults = std::make_shared<FaultPlan>();
  faults->add(Op::kReserve, {.error = ENOSPC, .max_nbytes = kChunk}, 1, 2, std::nullopt);
  Tally tally;
  check_stress(open_spill(2, kChunk, faults, 6 * kChunk), tally);
  CHECK(tally.num_refused > 0);
}

TEST(one_stripe_of_many_threads) {
  for (int round = 0; round < 20; ++round) {
    const auto faults = std::make_shared<FaultPlan>();
    faults->add(Op::kWrite, {.delay = microseconds(500)}, 1, 2, std::nullopt);
    if (round % 2) faults->add(Op::kWrite, {.error = EIO}, 2, 3, std::nullopt);
    const auto spill = open_spill(2, kChunk, faults);
    auto source = filled(kMost, round);
    char* data = source.get();
    auto stripe = spill->write(data, kMost, std::move(source));
    std::atomic<bool> cancelled{false};
    in_threads(5, [&](int i) {
      if (i == 0 && round % 4 > 1) cancelled = stripe->cancel();
      while (!stripe->wait_for(microseconds(100))) CHECK(stripe->under_way().op == Op::kWrite);
      CHECK(stripe->done());
      if (i == 1) stripe->drop_source();
      CHECK(stripe->place().find("lane") != std::string::npos);
      CHECK(stripe->end_ns() >= 0);
      if (!stripe->failure()) CHECK(reads_back(*stripe, round));
    });
    if (cancelled) CHECK_EQ(stripe->failure()->code, ECANCELED);
    in_threads(3, [&](int) { stripe->free(); });
    stripe.reset();
    check_empty(*spill);
    spill->close();
  }
}

TEST(closing_while_others_write) {
  for (int round = 0; round < 12; ++round) {
    const auto faults = std::make_shared<FaultPlan>();
    faults->add(std::nullopt, {.delay = microseconds(100)}, 1, 2, std::nullopt);
    if (round % 2) faults->add(Op::kWrite, {.error = EIO}, 1, 3, std::nullopt);
    const auto spill = open_spill(2, kChunk, faults);
    std::atomic<int> num_closed{0};
    std::thread closer([&] {
      std::this_thread::sleep_for(microseconds(2'000 * round));
      spill->close();
    });
    in_threads(4, [&](int i) {
      Tally tally;
      std::mt19937 random(100 * round + i);
      try {
        for (;;) live_once(*spill, random, tally);
      } catch (const std::invalid_argument&) {  // it is closed
        ++num_closed;
      }
      CHECK_EQ(tally.num_wrong.load(), 0);
    });
    closer.join();
    CHECK_EQ(num_closed.load(), 4);
    check_empty(*spill);
  }
}

TEST(a_write_whose_other_lane_is_closed_can_be_cancelled) {
  const auto faults = std::make_shared<FaultPlan>();
  faults->add(Op::kWrite, {.error = EIO}, 1, 1, std::nullopt);
  const auto spill = std::make_shared<StripedSpill>(std::nullopt);
  const auto broken = make_threads_engine(1, faults), closed = make_threads_engine(1, nullptr);
  for (const auto& engine : {broken, closed}) {
    spill->add(std::make_shared<SpillSpace>(unnamed_file(), std::nullopt, "here", nullptr), engine);
  }
  closed->close(false);
  auto source = filled(kChunk, 1);
  char* data = source.get();
  const auto stripe = spill->write(data, kChunk, std::move(source));
  CHECK(stripe->wait_for(seconds(120)));
  CHECK_EQ(stripe->failure()->code, EIO);
  CHECK(!stripe->cancel());
  CHECK_EQ(stripe->failure()->code, EIO);
  stripe->free();
  check_empty(*spill);
  spill->close();
}

TEST(extents_of_a_file_are_never_out_twice) {
  constexpr int64_t kUnits = 64;
  SpillSpace space(unnamed_file(), kUnits * 4096, "here", nullptr);
  std::vector<std::atomic<int>> owners(kUnits);
  std::atomic<int> num_refused{0};
  in_threads(4, [&](int i) {
    std::mt19937 random(i);
    std::vector<std::pair<int64_t, int64_t>> mine;  // first unit, number of units
    for (int round = 0; round < 400; ++round) {
      if (mine.size() < 12 && random() % 3) {
        const int64_t nbytes = 1 + random() % (16 * 4096);
        try {
          const int64_t first = space.allocate(nbytes) / 4096, num = space.rounded(nbytes) / 4096;
          for (int64_t k = first; k < first + num; ++k) CHECK_EQ(owners[k].exchange(i + 1), 0);
          mine.emplace_back(first, num);
        } catch (const OsError& error) {
          CHECK_EQ(error.code(), ENOSPC);
          ++num_refused;
        }
      } else if (!mine.empty()) {
        std::swap(mine[random() % mine.size()], mine.back());
        const auto [first, num] = mine.back();
        mine.pop_back();
        for (int64_t k = first; k < first + num; ++k) CHECK_EQ(owners[k].exchange(0), i + 1);
        space.free(first * 4096);
      }
      CHECK(space.used() <= space.capacity());
    }
    for (const auto& [first, num] : mine) {
      for (int64_t k = first; k < first + num; ++k) owners[k] = 0;
      space.free(first * 4096);
    }
  });
  CHECK(num_refused > 0);
  CHECK_EQ(space.used(), 0);
  CHECK(space.peak() > 0 && space.peak() <= kUnits * 4096);
  space.close();
  CHECK_EQ(space.fd(), -1);
  CHECK_THROWS(space.allocate(1), std::invalid_argument);
}
