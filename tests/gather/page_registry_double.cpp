// A PageRegistry over a pinner that notes its calls and fails when told to.
#include <stdexcept>
#include <vector>

#include "memory/page_registry.h"

using namespace dataeff;

namespace {

class RecordingPinner : public PagePinner {
 public:
  void pin(uintptr_t begin, int64_t nbytes) override {
    if (successes_left == 0) throw std::runtime_error("refused");
    if (successes_left > 0) --successes_left;
    for (const auto& [other, size] : pinned)
      misused |= begin < other + size && other < begin + nbytes;
    pinned[begin] = nbytes;
  }
  void unpin(uintptr_t begin) noexcept override { misused |= pinned.erase(begin) != 1; }

  std::map<uintptr_t, int64_t> pinned;
  int64_t successes_left = -1;  // negative: no end of them
  bool misused = false;         // pinned twice, or released without a pin
};

struct Harness {
  Harness(int64_t page, int64_t chunk) : registry(pinner, page, chunk) {}
  RecordingPinner pinner;
  PageRegistry registry;
  std::vector<std::vector<uintptr_t>> held;
};

}  // namespace

extern "C" {

Harness* harness_new(int64_t page, int64_t chunk) { return new Harness(page, chunk); }
void harness_free(Harness* h) { delete h; }
void fail_after(Harness* h, int64_t successes) { h->pinner.successes_left = successes; }

// The number to release it by, or -1 when it was refused.
int64_t acquire(Harness* h, int64_t begin, int64_t nbytes) {
  try {
    h->held.push_back(h->registry.acquire(begin, nbytes));
    return static_cast<int64_t>(h->held.size()) - 1;
  } catch (const std::runtime_error&) {
    return -1;
  }
}
void release(Harness* h, int64_t which) { h->registry.release(h->held[which]); }
int covers(Harness* h, int64_t begin, int64_t nbytes) { return h->registry.covers(begin, nbytes); }
int misused(Harness* h) { return h->pinner.misused; }
int64_t num_pins(Harness* h) { return static_cast<int64_t>(h->pinner.pinned.size()); }

// Writes (begin, nbytes) of each pinned range.
void pins(Harness* h, int64_t* to) {
  for (const auto& [begin, nbytes] : h->pinner.pinned) {
    *to++ = static_cast<int64_t>(begin);
    *to++ = nbytes;
  }
}
}
