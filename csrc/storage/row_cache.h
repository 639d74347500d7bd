// A cache of rows in host memory, replaced by S3-FIFO ("FIFO queues are all you need for cache
// eviction", SOSP 2023): a small queue that most rows pass through once, a main queue for those
// asked for again, and the bare numbers of rows that left the small one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "memory/host_mapping.h"

namespace dataeff {

// Row number -> value, for at most half as many rows as it has places: open addressing, no
// tombstones.
class RowMap {
 public:
  static constexpr int64_t kAbsent = INT64_MIN;

  explicit RowMap(int64_t max_rows);
  int64_t get(int64_t row) const;  // kAbsent when it is not there
  void set(int64_t row, int64_t value);
  void erase(int64_t row);

 private:
  struct Place {
    int64_t row = -1;
    int64_t value = 0;
  };

  uint64_t home(int64_t row) const;
  uint64_t find(int64_t row) const;  // its place, or the empty one where it would go

  std::vector<Place> places_;
  int shift_;
};

// A queue of at most `capacity` numbers.
class Fifo {
 public:
  explicit Fifo(int64_t capacity) : items_(capacity) {}
  int64_t size() const { return tail_ - head_; }
  int64_t capacity() const { return static_cast<int64_t>(items_.size()); }
  // The number under which the item can be recognised later.
  int64_t push(int64_t item) { return items_[tail_ % capacity()] = item, tail_++; }
  int64_t pop() { return items_[head_++ % capacity()]; }
  int64_t next_popped() const { return head_; }

 private:
  std::vector<int64_t> items_;
  int64_t head_ = 0;
  int64_t tail_ = 0;
};

// Not thread-safe.
class RowCache {
 public:
  // As many rows of `row_nbytes` bytes as `budget_nbytes` holds, bookkeeping included, and no more
  // than `num_rows`. Throws std::invalid_argument when not even two fit.
  static std::unique_ptr<RowCache> create(int64_t budget_nbytes, int64_t row_nbytes,
                                          int64_t num_rows);

  // The row, or nullptr; a hit counts as a use.
  const char* find(int64_t row);

  // Copies the row in unless it is there, and evicts another when the cache is full.
  void insert(int64_t row, const char* data);

  int64_t num_slots() const { return static_cast<int64_t>(slots_.size()); }
  int64_t size() const { return small_.size() + main_.size(); }
  bool contains(int64_t row) const { return map_.get(row) >= 0; }

 private:
  struct Slot {
    int64_t row = -1;
    uint8_t num_uses = 0;  // since it came in or was last passed over; at most 3
  };

  RowCache(int64_t num_slots, int64_t row_nbytes);
  char* data_of(int64_t slot) { return data_->data() + slot * row_nbytes_; }
  int64_t evict();  // a slot that is free now
  int64_t evict_small();
  int64_t evict_main();
  void remember(int64_t row);

  const int64_t row_nbytes_;
  const int64_t small_target_;
  std::vector<Slot> slots_;
  int64_t num_taken_ = 0;  // slots that have ever been used
  Fifo small_;
  Fifo main_;
  Fifo ghosts_;
  RowMap map_;  // a slot, or ~(number of its push) for a ghost
  std::shared_ptr<HostMapping> data_;
};

}  // namespace dataeff
