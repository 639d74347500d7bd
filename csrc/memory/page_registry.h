// Which pages of the process are registered with a device, and for how many owners.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace dataeff {

// What registers one range of whole pages; CUDA in the product, a recording double in tests.
class PagePinner {
 public:
  virtual ~PagePinner() = default;
  // Throws when the range cannot be registered; nothing of it is then.
  virtual void pin(uintptr_t begin, int64_t nbytes) = 0;
  virtual void unpin(uintptr_t begin) noexcept = 0;
};

// Tensors share pages, and tables share tensors, but a page can be registered only once and a range
// released only as a whole. So ranges are rounded to pages, cut where they meet pages that are
// registered already, and counted. Thread-safe.
class PageRegistry {
 public:
  // `chunk_nbytes`, a multiple of the page, bounds one call of pin(): CUDA refuses 512 GiB and
  // more.
  PageRegistry(PagePinner& pinner, int64_t page_nbytes, int64_t chunk_nbytes)
      : pinner_(pinner), page_nbytes_(page_nbytes), chunk_nbytes_(chunk_nbytes) {}

  // Registers what is not yet registered of [begin, begin + nbytes) and returns the ranges that
  // now have one owner more, by their first address. When a part fails everything is as before.
  std::vector<uintptr_t> acquire(uintptr_t begin, int64_t nbytes);

  // Takes one owner from each range; the last one releases it.
  void release(const std::vector<uintptr_t>& ranges) noexcept;

  // Whether every page of [begin, begin + nbytes) is registered.
  bool covers(uintptr_t begin, int64_t nbytes);

 private:
  struct Range {
    uintptr_t end;
    int64_t num_owners;
  };

  void pin_gap(uintptr_t begin, uintptr_t end, std::vector<uintptr_t>& taken);
  void release_locked(const std::vector<uintptr_t>& ranges) noexcept;
  // The first range that ends behind `address`.
  std::map<uintptr_t, Range>::iterator range_after(uintptr_t address);

  PagePinner& pinner_;
  const uintptr_t page_nbytes_;
  const uintptr_t chunk_nbytes_;
  std::mutex mutex_;
  std::map<uintptr_t, Range> ranges_;
};

}  // namespace dataeff
