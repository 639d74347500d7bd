#include "memory/page_registry.h"

#include <algorithm>

namespace dataeff {

std::map<uintptr_t, PageRegistry::Range>::iterator PageRegistry::range_after(uintptr_t address) {
  auto it = ranges_.upper_bound(address);
  if (it != ranges_.begin() && std::prev(it)->second.end > address) --it;
  return it;
}

std::vector<uintptr_t> PageRegistry::acquire(uintptr_t begin, int64_t nbytes) {
  std::vector<uintptr_t> taken;
  if (nbytes <= 0) return taken;
  const uintptr_t end = (begin + nbytes + page_nbytes_ - 1) / page_nbytes_ * page_nbytes_;
  uintptr_t at = begin / page_nbytes_ * page_nbytes_;
  std::lock_guard lock(mutex_);
  try {
    while (at < end) {
      const auto range = range_after(at);
      if (range != ranges_.end() && range->first <= at) {
        ++range->second.num_owners;
        taken.push_back(range->first);
        at = range->second.end;
      } else {
        const uintptr_t gap_end =
            range == ranges_.end() ? end : std::min<uintptr_t>(end, range->first);
        pin_gap(at, gap_end, taken);
        at = gap_end;
      }
    }
  } catch (...) {
    release_locked(taken);
    throw;
  }
  return taken;
}

void PageRegistry::pin_gap(uintptr_t begin, uintptr_t end, std::vector<uintptr_t>& taken) {
  for (uintptr_t at = begin; at < end;) {
    const uintptr_t next = end - at > chunk_nbytes_ ? at + chunk_nbytes_ : end;
    taken.reserve(taken.size() + 1);  // nothing may throw between the pin and its entry
    const auto entry = ranges_.insert({at, {next, 1}}).first;
    try {
      pinner_.pin(at, static_cast<int64_t>(next - at));
    } catch (...) {
      ranges_.erase(entry);
      throw;
    }
    taken.push_back(at);
    at = next;
  }
}

void PageRegistry::release(const std::vector<uintptr_t>& ranges) noexcept {
  std::lock_guard lock(mutex_);
  release_locked(ranges);
}

void PageRegistry::release_locked(const std::vector<uintptr_t>& ranges) noexcept {
  for (const uintptr_t begin : ranges) {
    const auto range = ranges_.find(begin);
    if (range == ranges_.end() || --range->second.num_owners > 0) continue;
    pinner_.unpin(begin);
    ranges_.erase(range);
  }
}

bool PageRegistry::covers(uintptr_t begin, int64_t nbytes) {
  std::lock_guard lock(mutex_);
  for (uintptr_t at = begin; at < begin + nbytes;) {
    const auto range = range_after(at);
    if (range == ranges_.end() || range->first > at) return false;
    at = range->second.end;
  }
  return true;
}

}  // namespace dataeff
