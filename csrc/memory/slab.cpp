#include "memory/slab.h"

#include <utility>

namespace dataeff {

std::shared_ptr<SlabPart> Slab::take(int64_t nbytes) {
  std::lock_guard lock(mutex_);
  const auto offset = extents_.allocate(nbytes);
  if (!offset) return nullptr;
  try {
    return std::make_shared<SlabPart>(shared_from_this(), *offset, nbytes);
  } catch (...) {
    extents_.free(*offset);
    throw;
  }
}

void Slab::give(int64_t offset) {
  std::lock_guard lock(mutex_);
  extents_.free(offset);
}

int64_t Slab::used() const {
  std::lock_guard lock(mutex_);
  return extents_.used();
}

int64_t Slab::peak() const {
  std::lock_guard lock(mutex_);
  return extents_.peak();
}

int64_t Slab::largest_free() const {
  std::lock_guard lock(mutex_);
  return extents_.largest_free();
}

void SlabPart::release() {
  if (const auto slab = std::exchange(slab_, nullptr)) slab->give(offset);
}

}  // namespace dataeff
