// The map from a node's global id to its place in the batch.
#pragma once

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "memory/huge_pages.h"

namespace dataeff {

// Open addressing with linear probing, at most half full. Its size follows the batch, not the
// graph: a call clears about as many slots as the call before it used.
template <typename Key>
class LocalIds {
 public:
  void reset() {
    int64_t wished = std::bit_ceil(static_cast<uint64_t>(4 * size_ + 1024));
    if (wished > allocated_) allocate(wished);
    set_capacity(wished);
    size_ = 0;
  }

  // The local id of `key`; a key not seen before gets `next`.
  int32_t find_or_insert(Key key, int32_t next) {
    Slot* slot = probe(key);
    if (slot->local >= 0) return slot->local;
    *slot = {key, next};
    if (2 * ++size_ > capacity_) grow();
    return next;
  }

  // The local id of `key`, or -1.
  int32_t find(Key key) const { return probe(key)->local; }

  void prefetch(Key key) const { __builtin_prefetch(&slots_[home(key)], 1); }

 private:
  struct Slot {
    Key key;
    int32_t local;  // -1 when empty
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  int64_t home(Key key) const {
    return static_cast<int64_t>((static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15) >> shift_);
  }

  Slot* probe(Key key) const {
    int64_t i = home(key);
    while (slots_[i].local >= 0 && slots_[i].key != key) i = (i + 1) & (capacity_ - 1);
    return &slots_[i];
  }

  void allocate(int64_t capacity) {
    slots_.reset(static_cast<Slot*>(std::malloc(static_cast<size_t>(capacity) * sizeof(Slot))));
    allocated_ = slots_ ? capacity : 0;
    if (!slots_) throw std::bad_alloc();
    prefer_huge_pages(slots_.get(), capacity * sizeof(Slot));
  }

  void set_capacity(int64_t capacity) {
    capacity_ = capacity;
    shift_ = 64 - std::countr_zero(static_cast<uint64_t>(capacity));
    std::memset(static_cast<void*>(slots_.get()), 0xFF,
                static_cast<size_t>(capacity) * sizeof(Slot));
  }

  void grow() {
    const auto old = std::move(slots_);
    const int64_t old_capacity = capacity_;
    allocate(4 * old_capacity);
    set_capacity(4 * old_capacity);
    for (int64_t i = 0; i < old_capacity; ++i) {
      if (old[i].local >= 0) *probe(old[i].key) = old[i];
    }
  }

  std::unique_ptr<Slot[], Free> slots_;
  int64_t allocated_ = 0;
  int64_t capacity_ = 0;
  int64_t size_ = 0;
  int shift_ = 63;
};

}  // namespace dataeff
