#include "storage/row_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

namespace dataeff {
namespace {

constexpr int64_t kSmallShare = 10;  // the small queue is one tenth, as in the paper
constexpr uint8_t kMaxUses = 3;
// Per slot: itself, its places in three queues and, with its ghost, four places of the map, which
// is at most half full; a power of two may double that.
constexpr int64_t kBookkeepingNbytes = 16 + 3 * 8 + 8 * 16;

}  // namespace

RowMap::RowMap(int64_t max_rows)
    : places_(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(2 * max_rows, 2)))),
      shift_(64 - std::countr_zero(places_.size())) {}

uint64_t RowMap::home(int64_t row) const {
  return static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15ull >> shift_;  // Fibonacci hashing
}

uint64_t RowMap::find(int64_t row) const {
  const uint64_t mask = places_.size() - 1;
  uint64_t at = home(row);
  while (places_[at].row != row && places_[at].row != -1) at = (at + 1) & mask;
  return at;
}

int64_t RowMap::get(int64_t row) const {
  const Place& place = places_[find(row)];
  return place.row == row ? place.value : kAbsent;
}

void RowMap::set(int64_t row, int64_t value) { places_[find(row)] = {row, value}; }

void RowMap::erase(int64_t row) {
  const uint64_t mask = places_.size() - 1;
  uint64_t hole = find(row);
  if (places_[hole].row != row) return;
  // Moves back whatever would no longer be found past the hole.
  for (uint64_t at = (hole + 1) & mask; places_[at].row != -1; at = (at + 1) & mask) {
    const uint64_t distance = (at - home(places_[at].row)) & mask;
    if (distance >= ((at - hole) & mask)) {
      places_[hole] = places_[at];
      hole = at;
    }
  }
  places_[hole] = {};
}

std::unique_ptr<RowCache> RowCache::create(int64_t budget_nbytes, int64_t row_nbytes,
                                           int64_t num_rows) {
  const int64_t slot_nbytes = row_nbytes + kBookkeepingNbytes;
  const int64_t num_slots = std::min(budget_nbytes / slot_nbytes, std::max<int64_t>(num_rows, 2));
  if (num_slots < 2) {
    throw std::invalid_argument("a cache of " + std::to_string(budget_nbytes) +
                                " bytes does not hold two rows of " + std::to_string(row_nbytes) +
                                " bytes: give it " + std::to_string(2 * slot_nbytes) +
                                " or more, or 0 for none");
  }
  return std::unique_ptr<RowCache>(new RowCache(num_slots, row_nbytes));
}

RowCache::RowCache(int64_t num_slots, int64_t row_nbytes)
    : row_nbytes_(row_nbytes),
      small_target_(std::max<int64_t>(num_slots / kSmallShare, 1)),
      slots_(num_slots),
      small_(num_slots),
      main_(num_slots),
      ghosts_(num_slots),
      map_(2 * num_slots),
      data_(HostMapping::create(num_slots * row_nbytes, /*shared=*/false)) {}

const char* RowCache::find(int64_t row) {
  const int64_t slot = map_.get(row);
  if (slot < 0) return nullptr;
  slots_[slot].num_uses = std::min<uint8_t>(slots_[slot].num_uses + 1, kMaxUses);
  return data_of(slot);
}

void RowCache::insert(int64_t row, const char* data) {
  if (contains(row)) return;
  const int64_t slot = num_taken_ < num_slots() ? num_taken_++ : evict();
  const bool was_here = map_.get(row) != RowMap::kAbsent;
  slots_[slot] = {row, 0};
  map_.set(row, slot);
  (was_here ? main_ : small_).push(slot);
  std::memcpy(data_of(slot), data, row_nbytes_);
}

int64_t RowCache::evict() {
  for (;;) {
    const bool from_small = small_.size() >= small_target_ || main_.size() == 0;
    const int64_t slot = from_small ? evict_small() : evict_main();
    if (slot >= 0) return slot;
  }
}

// The oldest of the small queue leaves, or moves to the main queue when it was used (then -1).
int64_t RowCache::evict_small() {
  const int64_t slot = small_.pop();
  Slot& old = slots_[slot];
  if (old.num_uses > 1) {
    old.num_uses = 0;
    main_.push(slot);
    return -1;
  }
  remember(old.row);
  return slot;
}

// The oldest of the main queue leaves, or goes to its end when it was used (then -1).
int64_t RowCache::evict_main() {
  const int64_t slot = main_.pop();
  Slot& old = slots_[slot];
  if (old.num_uses > 0) {
    --old.num_uses;
    main_.push(slot);
    return -1;
  }
  map_.erase(old.row);
  return slot;
}

void RowCache::remember(int64_t row) {
  if (ghosts_.size() == ghosts_.capacity()) {
    const int64_t push = ghosts_.next_popped();
    const int64_t oldest = ghosts_.pop();
    if (map_.get(oldest) == ~push) map_.erase(oldest);
  }
  map_.set(row, ~ghosts_.push(row));
}

}  // namespace dataeff
