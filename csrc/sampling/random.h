// Counter-based random numbers: each draw is a hash of where it is used, so a sample does not
// depend on the order in which threads make it.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace dataeff {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16).
DATAEFF_HOST_DEVICE uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// An indexed sequence of random numbers. `fork(i)` is a sequence of its own for each i, so that
// seed -> hop and relation -> node -> slot is a chain of forks with one draw at its end.
class Stream {
 public:
  DATAEFF_HOST_DEVICE explicit Stream(uint64_t key) : key_(key) {}

  DATAEFF_HOST_DEVICE uint64_t draw(uint64_t i) const { return mix64(key_ + kGolden * (i + 1)); }

  // Complemented before hashing: a fork never meets the numbers that `draw` hands out.
  DATAEFF_HOST_DEVICE Stream fork(uint64_t i) const {
    return Stream(mix64(~(key_ + kGolden * (i + 1))));
  }

  // Uniform in [0, n) by Lemire's multiplication; the bias is below n / 2^64.
  DATAEFF_HOST_DEVICE int64_t below(uint64_t i, int64_t n) const {
    return static_cast<int64_t>((static_cast<unsigned __int128>(draw(i)) * n) >> 64);
  }

  // Uniform in the open interval (0, 1).
  DATAEFF_HOST_DEVICE double unit(uint64_t i) const {
    return (static_cast<double>(draw(i) >> 11) + 0.5) * 0x1p-53;
  }

  uint64_t key() const { return key_; }

 private:
  uint64_t key_;
};

}  // namespace dataeff
