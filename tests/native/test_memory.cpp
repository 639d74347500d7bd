#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "errors.h"
#include "memory/extent_map.h"
#include "memory/host_mapping.h"
#include "memory/slab.h"
#include "memory/wsl.h"

using dataeff::ExtentMap;
using dataeff::HostMapping;
using dataeff::Slab;
using dataeff::SlabPart;

TEST(extents_agree_with_a_map_of_units) {
  constexpr int64_t kUnits = 200, kUnit = 16;
  std::mt19937 random(7);
  ExtentMap extents(kUnits * kUnit, kUnit);
  std::vector<bool> taken(kUnits);
  std::vector<std::pair<int64_t, int64_t>> out;  // first unit, number of units
  for (int step = 0; step < 20'000; ++step) {
    if (random() % 2) {
      const int64_t nbytes = random() % (30 * kUnit);
      if (const auto offset = extents.allocate(nbytes)) {
        const int64_t first = *offset / kUnit, count = extents.rounded(nbytes) / kUnit;
        for (int64_t i = first; i < first + count; ++i) {
          CHECK(!taken[i]);
          taken[i] = true;
        }
        out.emplace_back(first, count);
      } else {
        CHECK(extents.largest_free() < extents.rounded(nbytes));
      }
    } else if (!out.empty()) {
      std::swap(out[random() % out.size()], out.back());
      const auto [first, count] = out.back();
      out.pop_back();
      extents.free(first * kUnit);
      std::fill_n(taken.begin() + first, count, false);
    }
    CHECK_EQ(extents.used(), std::count(taken.begin(), taken.end(), true) * kUnit);
    CHECK_EQ(extents.num_used(), static_cast<int64_t>(out.size()));
  }
  for (const auto& [first, count] : out) extents.free(first * kUnit);
  CHECK_EQ(extents.num_free(), 1);
  CHECK_THROWS(extents.free(0), std::invalid_argument);
}

TEST(mappings_hold_whole_pages) {
  for (bool shared : {false, true}) {
    for (int64_t nbytes : {int64_t{0}, int64_t{1}, int64_t{4097}, dataeff::kHugePageBytes + 1}) {
      const auto mapping = HostMapping::create(nbytes, shared);
      CHECK_EQ(mapping->nbytes(), nbytes);
      CHECK_EQ(mapping->capacity() % dataeff::kPageBytes, 0);
      CHECK_EQ(reinterpret_cast<uintptr_t>(mapping->data()) % dataeff::kPageBytes, 0u);
      std::memset(mapping->data(), 1, mapping->capacity());
    }
  }
}

TEST(an_attached_mapping_is_the_same_memory) {
  const auto mapping = HostMapping::create(5000, true);
  const auto other = HostMapping::attach(mapping->fd(), 5000);
  mapping->data()[4999] = 42;
  CHECK_EQ(other->data()[4999], 42);
  CHECK_THROWS(HostMapping::attach(mapping->fd(), 9000), std::invalid_argument);
  CHECK_THROWS(HostMapping::attach(-1, 1), dataeff::OsError);
  CHECK_THROWS(HostMapping::create(-1, false), std::invalid_argument);
}

TEST(parts_of_a_slab_are_their_holders_alone) {
  auto slab = std::make_shared<Slab>(HostMapping::create(64 * dataeff::kPageBytes, false));
  std::mutex mutex;
  std::vector<std::shared_ptr<SlabPart>> handed_over;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      std::mt19937 random(i);
      for (int round = 0; round < 2'000; ++round) {
        std::shared_ptr<SlabPart> part = slab->take(1 + random() % (20 * dataeff::kPageBytes));
        if (!part) {
          CHECK(slab->largest_free() < slab->capacity());
        } else {
          std::memset(part->data(), i, part->nbytes);
          CHECK_EQ(std::count(part->data(), part->data() + part->nbytes, i), part->nbytes);
        }
        // Another thread may give it back.
        std::lock_guard lock(mutex);
        if (part && random() % 2) handed_over.push_back(std::move(part));
        if (!handed_over.empty() && random() % 2) handed_over.pop_back();
        if (part && random() % 2) part->release();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  handed_over.clear();
  CHECK_EQ(slab->used(), 0);
  const std::shared_ptr<SlabPart> whole = slab->take(slab->capacity() - 1);
  CHECK_EQ(slab->used(), slab->capacity());
  CHECK(!slab->take(1));
  CHECK_EQ(slab->peak(), slab->capacity());
  slab.reset();  // the memory stays as long as any part of it
  std::memset(whole->data(), 1, whole->nbytes);
}

TEST(a_kernel_of_windows_is_known_by_its_version) {
  char path[] = "/tmp/dataeff-version-XXXXXX";
  close(mkstemp(path));
  const auto found = [&](const char* version) {
    std::ofstream(path) << version << "\n";
    return dataeff::under_wsl(path);
  };
  CHECK(found("Linux version 5.15.90.1-microsoft-standard-WSL2 (oe-user@oe-host) (gcc) #1 SMP"));
  CHECK(found("Linux version 4.4.0-19041-Microsoft-WSL"));
  CHECK(!found("Linux version 6.1.0-18-amd64 (debian-kernel@lists.debian.org) (gcc-12) #1 SMP"));
  std::remove(path);
  CHECK(!dataeff::under_wsl(path));
}
