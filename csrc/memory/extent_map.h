// Which parts of an address range are in use: best fit, coalescing, growth at the end.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

namespace dataeff {

// Hands out disjoint extents of [0, capacity), in offsets and sizes that are multiples of
// `alignment`. Not thread-safe: its owner locks.
//
// Best fit with the lowest offset first: a training step asks for the same sizes in the same order
// again and again, and then finds the holes that the step before left. All calls are O(log n).
class ExtentMap {
 public:
  ExtentMap(int64_t capacity, int64_t alignment);

  // The offset of an extent of `nbytes`, rounded up to the alignment (nothing is still one unit),
  // or nullopt when no free part is large enough.
  std::optional<int64_t> allocate(int64_t nbytes);

  // Gives back the extent that begins at `offset`. Throws std::invalid_argument when none does.
  void free(int64_t offset);

  // Appends space at the end. Throws std::invalid_argument when `capacity` is less than now.
  void grow(int64_t capacity);

  int64_t rounded(int64_t nbytes) const;
  int64_t capacity() const { return capacity_; }
  int64_t used() const { return used_; }
  int64_t peak() const { return peak_; }
  int64_t num_used() const { return static_cast<int64_t>(used_by_offset_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_by_offset_.size()); }
  int64_t largest_free() const;
  // Free bytes at the very end: what growth can extend.
  int64_t tail_free() const;

 private:
  void insert_free(int64_t offset, int64_t nbytes);
  void erase_free(std::map<int64_t, int64_t>::iterator it);

  const int64_t alignment_;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
  int64_t peak_ = 0;
  std::map<int64_t, int64_t> free_by_offset_;
  std::set<std::pair<int64_t, int64_t>> free_by_size_;  // (nbytes, offset)
  std::unordered_map<int64_t, int64_t> used_by_offset_;
};

}  // namespace dataeff
