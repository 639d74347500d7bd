#include "memory/extent_map.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

namespace dataeff {

ExtentMap::ExtentMap(int64_t capacity, int64_t alignment) : alignment_(alignment) {
  if (alignment <= 0) {
    throw std::invalid_argument("alignment=" + std::to_string(alignment) + " must be positive");
  }
  grow(capacity);
}

int64_t ExtentMap::rounded(int64_t nbytes) const {
  if (nbytes < 0 || nbytes > (int64_t{1} << 62)) {
    throw std::invalid_argument("nbytes=" + std::to_string(nbytes) + " is no size of an extent");
  }
  return std::max((nbytes + alignment_ - 1) / alignment_, int64_t{1}) * alignment_;
}

std::optional<int64_t> ExtentMap::allocate(int64_t nbytes) {
  const int64_t wanted = rounded(nbytes);
  const auto best = free_by_size_.lower_bound({wanted, 0});
  if (best == free_by_size_.end()) return std::nullopt;
  const auto [found, offset] = *best;
  erase_free(free_by_offset_.find(offset));
  if (found > wanted) insert_free(offset + wanted, found - wanted);
  used_by_offset_.emplace(offset, wanted);
  used_ += wanted;
  peak_ = std::max(peak_, used_);
  return offset;
}

void ExtentMap::free(int64_t offset) {
  const auto it = used_by_offset_.find(offset);
  if (it == used_by_offset_.end()) {
    throw std::invalid_argument("no extent begins at offset " + std::to_string(offset) +
                                ": it was freed before or never allocated");
  }
  const int64_t nbytes = it->second;
  used_by_offset_.erase(it);
  used_ -= nbytes;
  insert_free(offset, nbytes);
}

void ExtentMap::grow(int64_t capacity) {
  if (capacity < capacity_) {
    throw std::invalid_argument("capacity=" + std::to_string(capacity) + " is less than the " +
                                std::to_string(capacity_) + " bytes there are");
  }
  const int64_t whole = capacity / alignment_ * alignment_;  // a partial unit serves nobody
  if (whole > capacity_) {
    const int64_t begin = capacity_;
    capacity_ = whole;
    insert_free(begin, whole - begin);
  }
}

int64_t ExtentMap::largest_free() const {
  return free_by_size_.empty() ? 0 : free_by_size_.rbegin()->first;
}

int64_t ExtentMap::tail_free() const {
  if (free_by_offset_.empty()) return 0;
  const auto& [offset, nbytes] = *free_by_offset_.rbegin();
  return offset + nbytes == capacity_ ? nbytes : 0;
}

void ExtentMap::insert_free(int64_t offset, int64_t nbytes) {
  auto next = free_by_offset_.lower_bound(offset);
  if (next != free_by_offset_.end() && next->first == offset + nbytes) {
    nbytes += next->second;
    const auto merged = next++;
    erase_free(merged);
  }
  if (next != free_by_offset_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      offset = previous->first;
      nbytes += previous->second;
      erase_free(previous);
    }
  }
  free_by_offset_.emplace(offset, nbytes);
  free_by_size_.emplace(nbytes, offset);
}

void ExtentMap::erase_free(std::map<int64_t, int64_t>::iterator it) {
  free_by_size_.erase({it->second, it->first});
  free_by_offset_.erase(it);
}

}  // namespace dataeff
