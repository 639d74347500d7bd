// One mapping, lent in parts that give themselves back.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "memory/extent_map.h"
#include "memory/host_mapping.h"

namespace dataeff {

class SlabPart;

// Best-fit parts of a mapping, in whole pages. Thread-safe.
class Slab : public std::enable_shared_from_this<Slab> {
 public:
  explicit Slab(std::shared_ptr<HostMapping> mapping)
      : mapping_(std::move(mapping)), extents_(mapping_->capacity(), kPageBytes) {}

  // A part of `nbytes`, of any content; nullptr when no free stretch is large enough.
  std::shared_ptr<SlabPart> take(int64_t nbytes);

  int64_t used() const;
  int64_t peak() const;
  int64_t largest_free() const;
  int64_t capacity() const { return mapping_->capacity(); }

 private:
  friend class SlabPart;
  void give(int64_t offset);

  const std::shared_ptr<HostMapping> mapping_;
  mutable std::mutex mutex_;
  ExtentMap extents_;
};

// Memory that is its holder's until `release`, or until it goes.
class SlabPart {
 public:
  SlabPart(std::shared_ptr<Slab> slab, int64_t offset, int64_t nbytes)
      : offset(offset), nbytes(nbytes), slab_(std::move(slab)), data_(slab_->mapping_->data()) {}
  ~SlabPart() { release(); }
  SlabPart(const SlabPart&) = delete;
  SlabPart& operator=(const SlabPart&) = delete;

  void release();
  char* data() const { return data_ + offset; }

  const int64_t offset;
  const int64_t nbytes;

 private:
  std::shared_ptr<Slab> slab_;  // none when it was released
  char* const data_;
};

}  // namespace dataeff
